"""Tests every option of PostProcessor, and to_instances, on two points with known scores."""

import pytest
import torch

from fcos_d2.modeling import PointGrid, PostProcessor, Predictions, to_instances

from .tiny import tiny_cfg

# One image of 8 x 16 pixels with the points (4, 4) and (12, 4), and two classes.
LEVELS = PointGrid([8]).levels([torch.empty(1, 1, 1, 2)], torch.empty(1, 3, 8, 16))
SIZES = torch.tensor([[8, 16]])


def predictions(probability) -> Predictions:
    """Returns predictions for an image: ``probability`` [class][point], and qualities 0.4 and 0.8.

    The first point predicts the box [0, 0, 16, 8], the second one [0, 0, 18, 8].
    """
    ltrb = torch.tensor([[0.5, 0.5, 1.5, 0.5], [1.5, 0.5, 0.75, 0.5]])
    return Predictions(
        [torch.tensor(probability).logit().view(1, 2, 1, 2)],
        [ltrb.T.reshape(1, 4, 1, 2)],
        [torch.tensor([0.4, 0.8]).logit().view(1, 1, 1, 2)],
        [],
    )


TWO_POINTS = predictions([[0.9, 0.3], [0.0, 0.6]])
NOTHING = predictions([[0.01, 0.01]] * 2)
ROOTS = [(p * q) ** 0.5 for p, q in ((0.6, 0.8), (0.9, 0.4), (0.3, 0.8))]


def detect(**options):
    """Returns the boxes, scores and classes in TWO_POINTS."""
    settings = {"nms_threshold": 1.0, "score_threshold": 0.05} | options
    detections = PostProcessor(**settings)(TWO_POINTS, LEVELS, SIZES)
    (found,) = to_instances(detections, SIZES.tolist())
    return found.pred_boxes.tensor.tolist(), found.scores.tolist(), found.pred_classes.tolist()


@pytest.mark.parametrize(
    "options, scores, classes",
    [
        ({}, ROOTS, [1, 0, 0]),
        ({"score_rule": "product"}, [0.48, 0.36, 0.24], [1, 0, 0]),
        ({"score_rule": "cls"}, [0.9, 0.6, 0.3], [0, 1, 0]),
        ({"score_threshold": 0.5}, ROOTS[:2], [1, 0]),
        ({"score_threshold": 0.4, "threshold_with_quality": True}, ROOTS[:1], [1]),
        ({"topk": 1}, ROOTS[:1], [1]),
        ({"topk": 1, "rank_with_quality": False}, ROOTS[1:2], [0]),
        ({"nms_threshold": 0.5}, ROOTS[:2], [1, 0]),
        ({"nms_threshold": 0.9}, ROOTS, [1, 0, 0]),  # they overlap by 16 / 18
        ({"nms_threshold": 0.5, "class_agnostic": True}, ROOTS[:1], [1]),
        (
            {"nms_threshold": 0.5, "nms_method": "linear"},
            [*ROOTS[:2], ROOTS[2] * (1 - 16 / 18)],
            [1, 0, 0],
        ),
        ({"max_detections": 2}, ROOTS[:2], [1, 0]),
    ],
    ids=str,
)
def test_options_determine_scores_and_classes(options, scores, classes):
    found = detect(**options)
    assert found[1] == pytest.approx(scores, rel=1e-4) and found[2] == classes


@pytest.mark.parametrize("extent", [0, 1])
def test_clipping_and_nms_use_the_pixel_extent(extent):
    # Unclipped, the boxes have an IoU of 16 / 18, and with an extent of 1, 17 / 19.
    assert detect(clip=True, pixel_extent=extent)[0][0] == [0, 0, 16 - extent, 8 - extent]
    assert len(detect(nms_threshold=0.891, pixel_extent=extent)[1]) == 3 - extent


def test_drop_empty_drops_boxes_without_area():
    maps = TWO_POINTS._replace(
        ltrb=[torch.tensor([0.5, 0.5, -0.5, 0.5]).view(1, 4, 1, 1).repeat(1, 1, 1, 2)]
    )
    for drop_empty, count in ((False, 3), (True, 0)):
        rule = PostProcessor(nms_threshold=1.0, score_threshold=0.05, drop_empty=drop_empty)
        assert rule(maps, LEVELS, SIZES).counts.tolist() == [count]


def test_gaussian_soft_nms_uses_sigma():
    wide, narrow = (detect(nms_method="gaussian", nms_sigma=s)[1][2] for s in (2.0, 0.5))
    assert narrow < wide < ROOTS[2]


def test_clip_clips_boxes_to_the_size_of_their_image():
    assert detect()[0] == [[0, 0, 18, 8], [0, 0, 16, 8], [0, 0, 18, 8]]
    maps = Predictions(*([level.repeat(2, 1, 1, 1) for level in m] for m in TWO_POINTS[:3]), [])
    boxes = PostProcessor(clip=True)(maps, LEVELS, torch.tensor([[8, 16], [5, 9]])).boxes
    assert boxes[:, 0].tolist() == [[0, 0, 16, 8], [0, 0, 9, 5]]


def test_each_image_gets_its_own_instances():
    pairs = zip(NOTHING[:3], TWO_POINTS[:3], strict=True)
    maps = Predictions(*([torch.cat((a[0], b[0]))] for a, b in pairs), [])
    sizes = [(8, 16), (7, 15)]
    detections = PostProcessor(nms_threshold=1.0)(maps, LEVELS, torch.tensor(sizes))
    found = to_instances(detections, sizes)
    assert [len(image) for image in found] == [0, 3]
    assert found[0].pred_boxes.tensor.shape == (0, 4)
    assert [image.image_size for image in found] == sizes
    assert found[1].pred_classes.dtype == torch.int64


def test_limits_differ_between_training_and_testing():
    cfg = tiny_cfg(
        INFERENCE_TH_TRAIN=0.1, PRE_NMS_TOPK_TRAIN=11, POST_NMS_TOPK_TRAIN=12,
        INFERENCE_TH_TEST=0.2, PRE_NMS_TOPK_TEST=21, POST_NMS_TOPK_TEST=22,
    )  # fmt: skip
    limits = [
        (p.selection["score_threshold"], p.selection["topk"], p.suppression["max_detections"])
        for p in (PostProcessor(cfg, split="TRAIN"), PostProcessor(cfg))
    ]
    assert limits == [(0.1, 11, 12), (0.2, 21, 22)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score_rule": "srqt"}, "SCORE_RULE must be one of 'sqrt', 'product', 'cls', got 'srqt'"),
        ({"pixel_extent": 2}, "PIXEL_EXTENT must be one of 0, 1, got 2"),
        ({"nms_method": "soft"}, "NMS_METHOD must be one of 'hard', 'linear', 'gaussian'"),
        ({"score_threshold": 5.0}, r"INFERENCE_TH_\* must be in \[0, 1\], got 5.0"),
        ({"nms_threshold": 60}, r"NMS_TH must be in \[0, 1\], got 60"),
        ({"topk": 0}, r"PRE_NMS_TOPK_\* must be in \[1, inf\], got 0"),
        ({"max_detections": 0}, r"POST_NMS_TOPK_\* must be in \[1, inf\], got 0"),
    ],
)
def test_invalid_option_is_rejected_at_construction(options, message):
    with pytest.raises(ValueError, match=f"FCOS: MODEL.FCOS.{message}"):
        PostProcessor(**options)
