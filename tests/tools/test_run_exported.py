"""Tests tools/run_exported.py with a detector that always returns one box."""

import json

import numpy as np
import pytest
from PIL import Image

from . import load_script

METADATA = {"channels": "RGB", "min_size": 20, "max_size": 100, "classes": ["disc"]}
ORIENTATION, ROTATED = 274, 6  # an EXIF tag, and its value for a rotation by 90 degrees


@pytest.fixture
def tool(monkeypatch):
    """Loads the script with a detector whose box is the upper half of its input."""
    module = load_script("tools/run_exported.py")

    def detect(images):
        height, width = images.shape[2:]
        boxes = np.array([[[0, 0, width, height / 2]]])
        return boxes, np.ones((1, 1)), np.zeros((1, 1), int), np.ones(1, int)

    monkeypatch.setattr(module, "load", lambda path: (detect, METADATA))
    return module


def test_exif_orientation_is_applied(tool, tmp_path, capsys):
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert tool.main(["model.onnx", str(tmp_path / "a.jpg")]) == 0
    assert json.loads(capsys.readouterr().out)["box"] == [0, 0, 40, 30]


def test_unreadable_files_are_reported_and_skipped(tool, tmp_path, capsys):
    Image.fromarray(np.full((40, 60), 30_000, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((40, 60), np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (60, 40)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no image")
    names = ("deep.png", "float.tif", "missing.png", "text.png", "good.png")
    status = tool.main(["model.onnx", *(str(tmp_path / name) for name in names)])
    out, err = capsys.readouterr()
    assert status == 1 and json.loads(out)["image"] == str(tmp_path / "good.png")
    assert err.count("skipped") == err.count("\n") == 4
    for name, mode in (("deep.png", "I;16"), ("float.tif", "F")):
        assert (
            f"skipped {tmp_path / name}: its pixels have more than 8 bits (Pillow's mode {mode}); "
            "convert it to 8 bits" in err
        )


def test_images_are_not_resized_if_min_size_is_0(tool):
    image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3))
    pixels = tool.prepare(image, METADATA | {"min_size": 0})
    np.testing.assert_array_equal(pixels, np.asarray(image).transpose(2, 0, 1))


def test_channel_order_is_that_of_the_model(tool):
    image = Image.new("RGB", (1, 200), (200, 100, 0))
    assert tool.prepare(image, METADATA)[:, 0, 0].tolist() == [200, 100, 0]
    assert tool.prepare(image, METADATA | {"channels": "BGR"})[:, 0, 0].tolist() == [0, 100, 200]
    gray = tool.prepare(image, METADATA | {"channels": "L"})
    assert gray.shape == (1, 100, 1) and gray[0, 0, 0] == 118
