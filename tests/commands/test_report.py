"""Tests the report command on a synthetic training run with five small images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from torch import nn

from fcos_d2.commands import report
from fcos_d2.evaluation import Objects
from fcos_d2.visualization.boxes import GRAY, PALETTE, PANEL_SIDE
from fcos_d2.visualization.sheet import GUTTER
from tests.catalogs import coco_content
from tests.modeling.tiny import tiny_cfg, tiny_fcos

SIZE = 64
SCALE = PANEL_SIDE // SIZE
TOP = GUTTER + 30 + 22  # of the first row of panels, below the heading and the titles


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Registers five gray images; all but the last have a box, image i one of class i % 3."""
    folder = tmp_path_factory.mktemp("images")
    objects = {}
    for i in range(5):
        Image.fromarray(np.full((SIZE, SIZE, 3), 100, np.uint8)).save(folder / f"{i}.png")
        objects[f"{i}.png"] = [(i % 3 + 1, (8, 16, 32, 16), int(i == 3))] if i < 4 else []
    content = coco_content(objects, ("class0", "class1", "class2"), (SIZE, SIZE))
    (folder / "test.json").write_text(json.dumps(content))
    register_coco_instances("report_test", {}, str(folder / "test.json"), str(folder))
    yield "report_test"
    DatasetCatalog.remove("report_test")
    MetadataCatalog.remove("report_test")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """Returns OUTPUT_DIR of a training run."""
    folder = tmp_path_factory.mktemp("output")
    sizes = ("INPUT.MIN_SIZE_TEST", SIZE, "DATASETS.TEST", (dataset,), "DATALOADER.NUM_WORKERS", 0)
    (folder / "config.yaml").write_text(tiny_cfg(*sizes).dump())
    rows = [{"iteration": i, "total_loss": 1.0, "lr": 0.1} for i in range(5)]
    rows.append({"iteration": 5, "bbox/AP": 61.24, "bbox/AP50": 80.0, "bbox/AP75": 70.0})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    model = tiny_fcos()
    nn.init.constant_(model.head.cls_logits.bias, 3.0)  # detections in every image
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture
def output(trained, tmp_path):
    """Returns a copy of ``trained`` that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "output"))


@pytest.fixture
def found(monkeypatch):
    """Replaces the detections: class 1 in every image, and class 2 in the first one."""
    box, images = np.array([[16.0, 16, 48, 48]]), {}
    for i in range(5):
        images[1 + i] = Objects(box, np.array([1]), np.array([0.9]))
    images[1] = Objects(np.concatenate([box, box]), np.array([1, 2]), np.array([0.9, 0.2]))
    monkeypatch.setattr(report, "_detect", lambda cfg, weights: images)


def panel(output, row, column) -> np.ndarray:
    """Returns one panel of the contact sheet, which has wider gaps between pairs."""
    sheet = np.asarray(Image.open(output / "contact_sheet.png"))
    left = GUTTER + column * (PANEL_SIDE + GUTTER) + column // 2 * 2 * GUTTER
    top = TOP + row * (PANEL_SIDE + GUTTER + 20)
    return sheet[top : top + PANEL_SIDE, left : left + PANEL_SIDE]


def color_at(panel: np.ndarray, x: int, y: int) -> tuple[int, ...]:
    """Returns the color at a position in the original image."""
    return tuple(panel[y * SCALE, x * SCALE].tolist())


def test_ground_truth_is_next_to_the_detections(output, found, capsys):
    assert report.main([str(output)]) == 0
    for i, color in enumerate([*PALETTE[:3], GRAY, (100, 100, 100)]):
        row, column = i // 3, i % 3 * 2
        truth, drawn = panel(output, row, column), panel(output, row, column + 1)
        assert color_at(truth, 24, 16) == color and color_at(truth, 8, 24) == color
        assert color_at(truth, 16, 40) == (100, 100, 100)
        assert color_at(drawn, 40, 16) == color_at(drawn, 16, 40) == PALETTE[1]
        assert color_at(drawn, 30, 25) == (100, 100, 100)
    assert Image.open(output / "curves.png").size[0] > 1000
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "AP 61.2   AP50 80.0   AP75 70.0"
    assert lines[1].endswith("curves.png") and lines[2].endswith("contact_sheet.png")


def test_detections_below_the_score_threshold_are_hidden(output, found):
    yellow = PALETTE[2]  # class 2, score 0.2
    for score, shown in ((0.1, True), (0.3, False)):
        assert report.main([str(output), "--score", str(score), "--images", "1"]) == 0
        assert (panel(output, 0, 1) == yellow).all(axis=-1).any() == shown


def test_images_are_evenly_spaced(output, found):
    assert report.main([str(output), "--images", "2"]) == 0
    sheet = Image.open(output / "contact_sheet.png")
    assert sheet.size[0] == 6 * GUTTER + 2 * GUTTER - GUTTER + 4 * PANEL_SIDE
    assert color_at(panel(output, 0, 0), 24, 16) == PALETTE[0]
    assert color_at(panel(output, 0, 2), 24, 16) == PALETTE[2]  # of the third image


def test_boxes_are_scaled_from_the_network_input_to_the_image(output):
    config = output / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(f"MIN_SIZE_TEST: {SIZE}", f"MIN_SIZE_TEST: {2 * SIZE}"))
    assert report.main([str(output), "--images", "1", "--score", "0"]) == 0
    drawn = panel(output, 0, 1)
    colored = np.any([(drawn == c).all(axis=-1) for c in PALETTE[:3]], axis=0)
    assert colored[:100].any() and colored[-100:].any() and colored[:, -100:].any()


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("config.yaml", "OUTPUT_DIR "),
        ("metrics.json", "config.yaml --resume"),
        ("model_final.pth", "config.yaml --resume"),
    ],
)
def test_error_for_a_missing_file_has_the_command_to_create_it(output, capsys, missing, command):
    (output / missing).unlink()
    assert report.main([str(output)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert f"{output / missing} does not exist" in printed
    assert "python train_net.py --config-file" in printed and command in printed


def test_ap_is_unknown_without_evaluation(output, found, capsys):
    (output / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0}\n')
    assert report.main([str(output), "--images", "1"]) == 0
    assert capsys.readouterr().out.startswith("AP unknown")
