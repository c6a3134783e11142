"""Tests that all commands agree with the evaluation for an unusual config.

It has grayscale images at their original size, more than 100 objects per image, a number of classes
from the data, and two test sets with the same image ids.
"""

import json

import numpy as np
import pytest
from PIL import Image

from fcos_d2 import Predictor
from fcos_d2.commands import analyze, benchmark, export, predict, report, train

from .tiny_training import ROOT, python

pytest_plugins = ["tests.script"]
pytestmark = pytest.mark.usefixtures("quiet_loggers")
RUNNER = ROOT / "tools" / "run_exported.py"

ODD = """
MODEL:
  META_ARCHITECTURE: "FCOS"
  DEVICE: "cpu"
  PIXEL_MEAN: [100.0]
  PIXEL_STD: [50.0]
  BACKBONE: {{NAME: "build_fcos_d2_resnet_fpn_backbone", FREEZE_AT: 0}}
  RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: "BN", OUT_FEATURES: ["res2"]}}
  FPN: {{IN_FEATURES: ["res2"], OUT_CHANNELS: 32}}
  FCOS:
    IN_FEATURES: ["p2"]
    FPN_STRIDES: [4]
    SIZES_OF_INTEREST: []
    TOP_LEVELS: 0
    NUM_CLS_CONVS: 1
    NUM_BOX_CONVS: 1
    NORM: "BN"
    INFERENCE_TH_TEST: 0.3
    POST_NMS_TOPK_TEST: 400
DATASETS:
  REGISTER:
    odd_one: {{json: "{folder}/one/found.json", images: "{folder}/one"}}
    odd_two: {{json: "{folder}/two/found.json", images: "{folder}/two"}}
  TRAIN: ["odd_one"]
  TEST: ["odd_one", "odd_two"]
INPUT: {{FORMAT: "L", MIN_SIZE_TRAIN: [160], MAX_SIZE_TRAIN: 160, MIN_SIZE_TEST: 0}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{OPTIMIZER: "ADAMW", IMS_PER_BATCH: 2, MAX_ITER: 60, BASE_LR: 0.01, WARMUP_ITERS: 5}}
TEST: {{AUG: {{MIN_SIZES: [160, 200], MAX_SIZE: 200, FLIP: False}}}}
SEED: 1
OUTPUT_DIR: "{folder}/output"
VERSION: 2
"""
CELL = 12  # distance of squares in pixels


def write_squares(folder, rows, columns):
    """Writes two images with a square in every cell of a grid: class 0 in even columns, else 1."""
    folder.mkdir()
    images, annotations = [], []
    for number in (1, 2):
        pixels = np.full((rows * CELL, columns * CELL), 60, np.uint8)
        for i in range(rows):
            for j in range(columns):
                x, y = j * CELL + 2, i * CELL + 2
                pixels[y : y + 8, x : x + 8] = 150 if j % 2 else 250
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number, "category_id": 1 + j % 2,
                    "bbox": [x, y, 8, 8], "area": 64, "iscrowd": 0,
                })  # fmt: skip
        noise = np.random.default_rng(number).integers(-20, 6, pixels.shape)  # makes squares unique
        Image.fromarray((pixels + noise).astype(np.uint8)).save(folder / f"{number}.png")
        size = {"width": columns * CELL, "height": rows * CELL}
        images.append({"id": number, "file_name": f"{number}.png", **size})
    categories = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dim"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "found.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Trains on 15 x 16 squares, with a second test set of 3 x 4; returns the folder."""
    folder = tmp_path_factory.mktemp("odd")
    write_squares(folder / "one", 15, 16)
    write_squares(folder / "two", 3, 4)
    (folder / "odd.yaml").write_text(ODD.format(folder=folder))
    assert train.main(["--config-file", str(folder / "odd.yaml")]) == 0
    return folder


def config_of(odd):
    return ["--config-file", str(odd / "odd.yaml")]


def weights_of(odd):
    return ["MODEL.WEIGHTS", str(odd / "output" / "model_final.pth")]


def evaluated(odd, name="odd_one", folder="inference") -> np.ndarray:
    """Returns the saved detections in image 1: x, y, width, height and score, best first."""
    path = odd / "output" / folder / name / "coco_instances_results.json"
    rows = [row for row in json.loads(path.read_text()) if row["image_id"] == 1]
    rows = np.array([[*row["bbox"], row["score"]] for row in rows])
    return rows[np.argsort(-rows[:, 4], kind="stable")]


def assert_same_detections(rows, expected):
    """Compares x, y, width, height and score in any order; a few low scores may differ by ties."""
    rows, expected = (part[part[:, 4] > 0.45] for part in (rows, expected))
    assert len(expected) > 200 and len(rows) == pytest.approx(len(expected), abs=2)
    nearest = np.abs(rows[:, None] - expected).max(axis=2).min(axis=0)
    assert (nearest < 0.02).mean() > 0.99


def test_both_datasets_keep_their_detections(odd):
    assert len(evaluated(odd)) > 200 and 10 < len(evaluated(odd, "odd_two")) < 50
    last = [json.loads(line) for line in (odd / "output/metrics.json").open()][-1]
    assert last["odd_one/best_f1/F1"] > 90 and last["odd_two/bbox/AP50"] > 90
    assert last["odd_one/bbox/AP50"] < 95, "COCO counts the best 100 of a class"
    (of_all,) = (value for key, value in last.items() if "odd_one/bbox_of_" in key)
    assert of_all > last["odd_one/bbox/AP"]


def test_eval_only_agrees_and_augmentation_finds_a_similar_number(odd):
    expected = evaluated(odd)
    words = ["--eval-only", *weights_of(odd), "TEST.AUG.ENABLED", "True"]
    assert train.main([*config_of(odd), *words]) == 0
    assert_same_detections(evaluated(odd), expected)
    assert len(evaluated(odd, folder="inference_TTA")) > 200


def test_class_order_is_compared_before_training_and_evaluation(odd, capsys):
    content = json.loads((odd / "two/found.json").read_text())
    content["categories"] = [{"id": 1, "name": "dim"}, {"id": 2, "name": "bright"}]
    (odd / "two/swapped.json").write_text(json.dumps(content))
    text = (odd / "odd.yaml").read_text().replace("two/found.json", "two/swapped.json")
    (odd / "swapped.yaml").write_text(text.replace("odd_", "swapped_"))
    config = ["--config-file", str(odd / "swapped.yaml")]
    output = ["OUTPUT_DIR", str(odd / "swapped")]
    for words in (config, [*config, "--eval-only", *weights_of(odd)]):
        assert train.main([*words, *output]) == 2
        printed = capsys.readouterr()
        assert "error: dataset 'swapped_two': class 0 is dim, but bright in" in printed.err
        assert "Evaluation results" not in printed.out and "iter:" not in printed.out


def test_report_shows_the_first_dataset(odd, capsys):
    assert report.main([str(odd / "output"), "--images", "1"]) == 0
    page = (odd / "output/report/index.html").read_text()
    assert "480" in page and "bright" in page


def test_predict_and_predictor_agree_with_the_evaluation(odd):
    image, expected = odd / "one/1.png", evaluated(odd)
    found = odd / "found.json"
    words = [str(image), "--json", str(found), "--output", str(odd / "drawn"), "--score", "0"]
    assert predict.main([*words, *config_of(odd)]) == 0
    (entry,) = json.loads(found.read_text())
    rows = np.array([[*one["box"], one["score"]] for one in entry["objects"]])
    rows[:, 2:4] -= rows[:, :2]
    assert_same_detections(rows, expected)
    predictor = Predictor.from_config(str(odd / "odd.yaml"), threshold=0.0)
    result = predictor(np.asarray(Image.open(image).convert("RGB")))
    rows = np.array([[*row["bbox"], row["score"]] for row in result.to_coco()])
    assert_same_detections(rows, expected)
    assert set(result.names) == {"bright", "dim"} and result.draw().shape == (300, 320, 3)


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch_export", marks=pytest.mark.slow)])
def test_exported_file_agrees_with_the_evaluation(odd, format):
    path = odd / {"onnx": "odd.onnx", "torch_export": "odd.pt2"}[format]
    words = ["--format", format, "--output", str(path), "--verify", "--images", "2"]
    assert export.main([*config_of(odd), *words, *weights_of(odd)]) == 0
    done = python(RUNNER, path, odd / "one/1.png", "--score", "0", cwd=odd)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    rows = np.array([[*line["box"], line["score"]] for line in lines])
    rows[:, 2:4] -= rows[:, :2]
    assert_same_detections(rows, evaluated(odd))


def test_benchmark_and_analyze_accept_the_config(odd, capsys):
    words = [*config_of(odd), "--batch", "1", "--seconds", "0.01"]
    assert benchmark.main([*words, *weights_of(odd)]) == 0
    assert benchmark.main([*words, "--size", "64", "96"]) == 0
    assert analyze.main([*config_of(odd), "--size", "64", "96"]) == 0
    capsys.readouterr()
    assert analyze.main(config_of(odd)) == 2
    assert "pass --size" in capsys.readouterr().err
