"""Tests that tiling neither misses nor duplicates objects at the borders of tiles."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fcos_d2.commands.predict import main
from fcos_d2.errors import InputError
from fcos_d2.evaluation import Objects, evaluate_boxes
from fcos_d2.predictor import Prediction
from fcos_d2.tiling import TiledPredictor, tiles_of


class Rectangles:
    """Predictor that detects bright rectangles of at least 1/20 of the image size."""

    class_names = ["small", "large"]

    def __init__(self):
        self.sizes = []

    def predict(self, images):
        self.sizes += [image.shape[:2] for image in images]
        return [self._predict_one(image) for image in images]

    def _predict_one(self, image):
        labels, _ = ndimage.label(image[:, :, 0] > 128)
        boxes = [
            (s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(labels)
        ]
        limit = max(image.shape[:2]) / 20
        boxes = [b for b in boxes if max(b[2] - b[0], b[3] - b[1]) >= limit]
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        classes = ((boxes[:, 2:] - boxes[:, :2]).max(1, initial=0) > 50).astype(np.int64)
        scores = np.linspace(0.9, 0.8, len(boxes)).astype(np.float32)
        names = [self.class_names[c] for c in classes]
        return Prediction(image, boxes, scores, classes, names, [7 + c for c in classes.tolist()])


def random_image(rng, count=6, side=160):
    """Returns an image of disjoint rectangles of 10 to 40 pixels, and their boxes."""
    image, boxes = np.zeros((side, side, 3), np.uint8), []
    while len(boxes) < count:
        x, y = rng.integers(1, side - 41, 2)
        w, h = rng.integers(10, 41, 2)
        if not image[y - 1 : y + h + 1, x - 1 : x + w + 1].any():
            image[y : y + h, x : x + w] = 255
            boxes.append((x, y, x + w, y + h))
    return image, np.array(boxes, float)


def average_precision(predictor, images, truth) -> float:
    found = [Objects(p.boxes, p.classes, p.scores) for p in predictor.predict(images)]
    truth = [Objects(b, np.zeros(len(b), int)) for b in truth]
    return evaluate_boxes(truth, found, 1).average()


def test_ap_does_not_depend_on_the_size_of_the_image():
    rng = np.random.default_rng(0)
    images, boxes = zip(*(random_image(rng) for _ in range(10)), strict=True)
    assert average_precision(Rectangles(), images, boxes) == pytest.approx(100)
    large, moved = [], []
    for image, truth in zip(images, boxes, strict=True):
        x, y = rng.integers(0, 1300, 2)
        canvas = np.zeros((1500, 1500, 3), np.uint8)
        canvas[y : y + 160, x : x + 160] = image
        large.append(canvas)
        moved.append(truth + [x, y, x, y])
    assert average_precision(Rectangles(), large, moved) < 50
    assert average_precision(TiledPredictor(Rectangles(), 160), large, moved) == pytest.approx(100)


def test_objects_larger_than_tiles_are_detected_in_the_whole_image():
    canvas = np.zeros((900, 1200, 3), np.uint8)
    canvas[100:700, 200:1000] = 255
    canvas[800:810, 500:520] = 255
    (found,) = TiledPredictor(Rectangles(), 160).predict([canvas])
    assert sorted(found.boxes.tolist()) == [[200, 100, 1000, 700], [500, 800, 520, 810]]
    order = np.argsort(found.classes)
    assert [found.names[i] for i in order] == ["small", "large"]
    assert [found.category_ids[i] for i in order] == [7, 8] and found.image is canvas


def test_image_smaller_than_a_tile_is_predicted_once():
    predictor = Rectangles()
    (found,) = TiledPredictor(predictor, 200).predict([random_image(np.random.default_rng(1))[0]])
    assert predictor.sizes == [(160, 160)] and len(found) == 6


@pytest.mark.parametrize("width, height, side", [(1000, 700, 128), (129, 128, 128), (4001, 40, 64)])
def test_tiles_cover_the_image_and_overlap_by_half(width, height, side):
    tiles = list(tiles_of(width, height, side))
    covered = np.zeros((height, width), int)
    for tile in tiles:
        covered[tile.y : tile.bottom, tile.x : tile.right] += 1
        assert tile.right - tile.x == min(side, width) and tile.bottom - tile.y == min(side, height)
    assert covered.min() >= 1
    for starts, length in ((sorted({t.x for t in tiles}), width), ({t.y for t in tiles}, height)):
        assert (np.diff(sorted(starts)) <= side // 2).all() and max(starts) == max(length - side, 0)


def test_too_small_tile_is_refused():
    with pytest.raises(InputError, match="--tile must be at least 32 pixels, got 8"):
        TiledPredictor(Rectangles(), 8)


def test_command_line_enables_tiling(tmp_path, monkeypatch):
    monkeypatch.setattr("fcos_d2.commands.predict.load_predictor", lambda options: Rectangles())
    canvas = np.zeros((900, 1200, 3), np.uint8)
    canvas[800:810, 500:520] = 255
    Image.fromarray(canvas).save(tmp_path / "large.png")
    command = [str(tmp_path / "large.png"), "--json", str(tmp_path / "found.json")]
    assert main(command) == 0 and main([*command, "--tile", "160"]) == 0
    (entry,) = json.loads((tmp_path / "found.json").read_text())
    assert [item["box"] for item in entry["objects"]] == [[500, 800, 520, 810]]
    assert main([*command, "--tile", "8"]) == 2
