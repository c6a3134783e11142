"""Tests test-time augmentation with a detector whose predictions can be computed by hand.

Its only level has stride 8. A cell brighter than 128 on average is an object of class 0, whose box
extends 8 pixels from the center of the cell in each direction.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import Backbone, DatasetMapperTTA
from torch import nn

from fcos_d2.modeling import FCOS, PointGrid, PostProcessor, Predictions
from fcos_d2.modeling.tta import FCOSWithTTA
from tests.modeling.tiny import tiny_cfg, tiny_fcos
from tests.tiny_training import metrics

pytest_plugins = ["tests.script"]
SCORE = 1 / (1 + math.exp(-(255 - 128) / 32))  # of a white cell; quality is practically 1


class Brightness(Backbone):
    size_divisibility = 8

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return {"p3": F.avg_pool2d(images, 8)[:, :1]}


class Squares(nn.Module):
    def forward(self, features):
        (brightness,) = features
        logits = (brightness - 128) / 32
        return Predictions(
            [logits], [torch.ones_like(logits).expand(-1, 4, -1, -1)], [logits * 0 + 50], []
        )


def detector(**options):
    return FCOS(
        backbone=Brightness(), head=Squares(), losses=None,
        postprocess=PostProcessor(score_threshold=0.5, score_rule="product", **options),
        grid=PointGrid([8]), head_in_features=["p3"], pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3,
    ).eval()  # fmt: skip


def with_tta(model, *sizes, flip=False):
    views = DatasetMapperTTA(min_sizes=list(sizes), max_size=1000, flip=flip)
    return FCOSWithTTA(model=model, views=views)


def make_input(height=64, width=64, row=2, column=1):
    """Returns a black image with one white cell."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 255
    return {"image": image, "height": height, "width": width}


def found(model, image):
    instances = model([image])[0]["instances"]
    assert (instances.pred_classes == 0).all()
    rows = zip(instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), strict=True)
    return [(tuple(round(x, 3) for x in box), score) for box, score in rows]


BOX = (4.0, 12.0, 20.0, 28.0)  # around the point (12, 20)


def test_single_view_of_the_original_size_does_not_change_detections():
    model = tiny_fcos(INFERENCE_TH_TEST=0.005).eval()
    image = {"image": torch.randint(256, (3, 96, 130), dtype=torch.uint8)}
    augmented = with_tta(model, 96)([image])[0]["instances"]
    plain = model([image])[0]["instances"]
    assert len(plain) > 20 and augmented.image_size == plain.image_size
    assert torch.equal(augmented.pred_boxes.tensor, plain.pred_boxes.tensor)
    assert torch.equal(augmented.scores, plain.scores)


def test_nms_merges_the_box_of_the_flipped_view():
    assert found(with_tta(detector(), 64, flip=True), make_input()) == [
        (BOX, pytest.approx(SCORE, abs=1e-4))
    ]


def test_boxes_of_an_enlarged_view_are_scaled_to_the_original_size():
    """At twice the size, the white cell becomes four, whose boxes extend 4 original pixels."""
    boxes = [box for box, _ in found(with_tta(detector(), 128), make_input())]
    corners = [(10, 18), (14, 18), (10, 22), (14, 22)]  # the four points, (x, y)
    assert sorted(boxes) == sorted((x - 4, y - 4, x + 4, y + 4) for x, y in corners)


@pytest.mark.parametrize("nms_threshold, kept", [(0.2, 1), (0.3, 3), (0.35, 5)])
def test_views_of_different_sizes_are_merged_before_nms(nms_threshold, kept):
    """The four small boxes overlap the large one by 1/4, their neighbors by 1/3."""
    model = with_tta(detector(nms_threshold=nms_threshold), 64, 128)
    assert len(found(model, make_input())) == kept


def test_boxes_are_in_pixels_of_the_original_size():
    given = {**make_input(), "height": 128, "width": 192}
    ((box, _),) = found(with_tta(detector(), 64), given)
    assert box == (12.0, 24.0, 60.0, 56.0)


def test_soft_nms_lowers_the_second_of_two_equal_boxes():
    model = detector(nms_method="gaussian", nms_sigma=0.5)
    first, second = found(with_tta(model, 64, flip=True), make_input())
    assert first[0] == second[0] == BOX
    assert second[1] == pytest.approx(first[1] * math.exp(-1 / 0.5), rel=1e-4)


def test_boxes_are_clipped_and_views_of_different_sizes_are_not_padded():
    model = detector()
    assert found(with_tta(model, 64, 128, flip=True), make_input(64, 96, 0, 0))[0][0] == (
        0,
        0,
        12,
        12,
    )
    assert model.backbone.shapes == [(2, 3, 64, 96), (2, 3, 128, 192)]


def test_views_follow_the_config():
    options = ("TEST.AUG.MIN_SIZES", (40, 60), "TEST.AUG.MAX_SIZE", 70, "TEST.AUG.FLIP", False)
    cfg = tiny_cfg(*options)
    views = FCOSWithTTA(cfg, detector()).views(make_input(48, 96))
    assert [tuple(view["image"].shape[1:]) for view in views] == [(35, 70)] * 2
    assert get_cfg().TEST.AUG.FLIP, "the published recipe flips images"


def test_evaluation_reports_results_with_and_without_augmentation(script):
    done = script(
        "--eval-only", "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64),
        "OUTPUT_DIR", "out", "MODEL.WEIGHTS", "",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert {"bbox", "bbox_TTA"} <= set(done.results[0])
    assert set(done.results[0]["bbox_TTA"]) == set(done.results[0]["bbox"])
    assert (script.folder / "out/inference_TTA/tiny_shapes/coco_instances_results.json").is_file()


SMALL_VIEWS = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64), "TEST.EVAL_PERIOD", 1)


def test_only_the_last_evaluation_of_training_is_augmented(script):
    done = script(*SMALL_VIEWS, "TEST.EXPECTED_RESULTS", [["bbox_TTA", "AP", 50, 50]])
    assert done.status == 0, done.err
    saved = "Saving results to ./output/{}/tiny_shapes/coco_instances_results.json".format
    assert done.out.count(saved("inference")) == 2 and done.out.count(saved("inference_TTA")) == 1
    assert {"bbox/AP", "bbox_TTA/AP"} <= metrics(script.folder / "output")[-1].keys()
    assert {"bbox", "bbox_TTA"} <= set(done.results[0])


def test_other_architectures_are_rejected_before_training(script, monkeypatch):
    monkeypatch.setattr("fcos_d2.inference.FCOS", Squares)
    done = script(*SMALL_VIEWS)
    assert done.status == 2 and "TEST.AUG.ENABLED needs MODEL.META_ARCHITECTURE FCOS" in done.err
    assert not (script.folder / "output/metrics.json").exists()
