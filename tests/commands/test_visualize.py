"""Tests the visualize and check commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.commands import visualize
from fcos_d2.data.custom import image_filter
from tests.catalogs import coco_content

CONFIG = """
MODEL:
  FCOS:
    IN_FEATURES: ["p3", "p4"]
    FPN_STRIDES: [8, 16]
    SIZES_OF_INTEREST: [32]
DATASETS:
  REGISTER:
    seen_train: {json: "labels.json", images: "photos", part: [0, 0.5]}
    seen_val: {json: "labels.json", images: "photos", part: [0.5, 1]}
  TRAIN: ["seen_train"]
  TEST: ["seen_val"]
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 128, RANDOM_FLIP: "none"}
OUTPUT_DIR: "output"
VERSION: 2
"""


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """Writes 20 photos of 64 x 64 pixels, with a box of 3 and one of 40 pixels each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    objects = {}
    for n in range(20):
        Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "photos" / f"{n}.png")
        objects[f"{n}.png"] = [(1, (17 + n % 3, 17, 3, 3)), (2, (12, 12, 40, 40))]
    content = coco_content(objects, ("dot", "disc", "never"), (64, 64))
    (tmp_path / "config.yaml").write_text(CONFIG)
    write(content)
    return content


def write(content) -> None:
    Path("labels.json").write_text(json.dumps(content))


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = visualize.main(["--config-file", "config.yaml", *arguments])
    return status, *capsys.readouterr()


def test_valid_data_is_ready_to_train_and_its_classes_are_counted(labels, capsys):
    status, out, _ = run(capsys, "--check")
    assert status == 0 and out.rstrip().endswith("ready to train")
    assert out.count("never used") == 2
    lines = [line.split() for line in out.splitlines() if line.startswith("  dot")]
    assert sum(int(words[1]) for words in lines) == 20


def test_boxes_without_points_are_counted_and_levels_suggested(labels, capsys):
    _, out, _ = run(capsys, "--check", "--dataset", "seen_train")
    count = out.partition(" images,")[0].split()[-1]
    assert f"boxes without an assigned point: {count} of {2 * int(count)} (50.0%)" in out
    assert f"({count} too small, 0 covered by smaller boxes)" in out
    assert "other levels would leave out only" in out and "FPN_STRIDES: [4, 8]" in out
    assert "raise INPUT.MIN_SIZE_TRAIN" in out
    # The suggested config passes the check.
    text = out.partition("MODEL:\n")[2].splitlines()
    yaml = ["MODEL:"] + [line[4:] for line in text if line.startswith("      ")]
    Path("better.yaml").write_text("_BASE_: config.yaml\n" + "\n".join(yaml) + "\n")
    assert (
        visualize.main(["--config-file", "better.yaml", "--check", "--dataset", "seen_train"]) == 0
    )
    assert f"boxes without an assigned point: {count} of" not in capsys.readouterr().out


def test_defects_are_listed_and_removed_by_clean(labels, capsys):
    labels["annotations"][3]["bbox"] = None
    labels["annotations"][4].update(bbox=[20, 20, -3, 3], iscrowd="0")
    write(labels)
    Path("photos/4.png").write_bytes(Path("photos/4.png").read_bytes()[:50])
    status, out, _ = run(capsys, "--check")
    assert status == 1 and "problems to correct: 2" in out
    for line in (
        "image photos/4.png: ",
        "annotation 4: bbox is missing",
        "repaired: 1 boxes with neg",
    ):
        assert line in out
    status, out, _ = run(capsys, "--check", "--clean")
    assert status == 1 and "37 of 40 annotations: labels_clean.json; use it in the config" in out
    for line in (
        "repaired: 1 boxes with negative width or height: corners swapped",
        "repaired: 1 iscrowd written as a string: converted",
        "removed: 1 annotations with an invalid bbox",
        "removed: 1 unusable images",
    ):
        assert line in out.splitlines()
    config = Path("config.yaml")
    config.write_text(config.read_text().replace("labels.json", "labels_clean.json"))
    status, out, _ = run(capsys, "--check")
    assert status == 0 and "ready to train" in out and "repaired" not in out
    assert len(json.loads(Path("labels_clean.json").read_text())["images"]) == 19


@pytest.mark.parametrize("num_broken, is_written", [(5, True), (40, False)])
def test_clean_file_without_annotations_is_not_written(labels, capsys, num_broken, is_written):
    for annotation in labels["annotations"][:num_broken]:
        annotation["bbox"] = None
    write(labels)
    status, out, _ = run(capsys, "--check", "--clean", "--skip-images")
    assert status == 1 and Path("labels_clean.json").exists() == is_written
    refusal = "not written: labels_clean.json would keep none of 40 annotations"
    assert (refusal in out) != is_written


def test_images_shared_by_training_and_test_sets_are_a_problem(labels, capsys):
    config = Path("config.yaml")
    config.write_text(
        config.read_text().replace(", part: [0, 0.5]", "").replace("[0.5, 1]", "[0, 1]")
    )
    status, out, _ = run(capsys, "--check", "--skip-images")
    assert status == 1 and "20 of the 20 images of seen_val are also in the training data" in out


def test_data_with_crowds_only_is_not_ready(labels, capsys):
    for annotation in labels["annotations"]:
        annotation["iscrowd"] = 1
    write(labels)
    status, out, _ = run(capsys, "--check", "--skip-images")
    assert status == 1 and "annotations are crowd regions" in out and "ready" not in out


def test_different_class_order_and_number_are_problems(labels, capsys):
    labels["categories"][0]["name"], labels["categories"][1]["name"] = "disc", "dot"
    Path("other.json").write_text(json.dumps(labels))
    config = CONFIG.replace('seen_val: {json: "labels', 'seen_val: {json: "other')
    Path("config.yaml").write_text(config)
    status, out, _ = run(capsys, "--check", "--skip-images")
    assert status == 1 and "class 0 is disc, but dot in the training data; set classes" in out
    status, out, _ = run(capsys, "--check", "--skip-images", "MODEL.FCOS.NUM_CLASSES", "7")
    assert status == 1 and "set MODEL.FCOS.NUM_CLASSES 3" in out


def test_drawings_show_objects_and_the_points_of_every_level(labels, capsys):
    status, out, _ = run(capsys, "--images", "2", "--output", "drawn")
    assert status == 0 and "drawn/seen_train" in out
    files = sorted(Path("drawn").rglob("*.png"))
    assert len(files) == 4
    drawing = np.asarray(Image.open(files[0]))
    assert drawing.shape[1] > 2 * 320 and len(np.unique(drawing.reshape(-1, 3), axis=0)) > 20


def test_data_registered_without_sizes_is_checked(labels, capsys):
    box = {"bbox": [12, 12, 52, 52], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    records = [{"file_name": f"photos/{n}.png", "annotations": [box]} for n in range(3)]
    DatasetCatalog.register("in_python", lambda: records)
    MetadataCatalog.get("in_python").thing_classes = ["disc"]
    for arguments in (["--check"], ["--check", "--skip-images"]):
        arguments += ["--dataset", "in_python", "MODEL.FCOS.NUM_CLASSES", "1"]
        status, out, _ = run(capsys, *arguments)
        assert status == 0 and "levels at INPUT.MIN_SIZE_TRAIN 64, 3 images" in out


def test_clean_file_drops_images_broken_in_the_folder_of_any_entry(labels, capsys):
    Path("more").mkdir()
    for n in range(20):
        Path(f"more/{n}.png").write_bytes(Path(f"photos/{n}.png").read_bytes())
    config = CONFIG.replace('"photos", part: [0.5', '"more", part: [0.5')
    Path("config.yaml").write_text(config)
    names = [image["file_name"] for image in labels["images"]]
    broken = [next(filter(image_filter(part), names)) for part in ((0, 0.5), (0.5, 1))]
    for folder, name in zip(("photos", "more"), broken, strict=True):
        Path(folder, name).write_bytes(b"")
    assert run(capsys, "--check", "--clean")[0] == 1
    kept = {
        image["file_name"] for image in json.loads(Path("labels_clean.json").read_text())["images"]
    }
    assert kept == {f"{n}.png" for n in range(20)} - set(broken)


def test_masks_are_checked_if_mask_on_is_set(labels, capsys):
    labels["annotations"][0]["segmentation"] = 3
    write(labels)
    assert run(capsys, "--check", "--skip-images")[0] == 0
    status, out, _ = run(capsys, "--check", "--skip-images", "MODEL.MASK_ON", "True")
    assert status == 1 and "annotation 1: segmentation must be polygons" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--check", "--dataset", "unknown"], "unknown dataset 'unknown'"),
        (["--check", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], "there is no dataset"),
        (["MODEL.FCOS.SIZES_OF_INTEREST", "[1, 2, 3]"], "1 ascending bounds between 2 levels"),
    ],
)
def test_errors_are_one_line(labels, capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
