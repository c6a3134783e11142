"""batched_nms and batched_nms_padded: hand-computed cases, torchvision, and invalid input."""

import math

import pytest
import torch

from fcos_d2.ops import batched_nms, batched_nms_padded

from . import inputs

# Each box has IoU 3/5 with the next one and 1/3 with the one after that.
CHAIN = torch.tensor([[0.0, 0, 4, 4], [1, 0, 5, 4], [2, 0, 6, 4], [3, 0, 7, 4]])
FALLING = torch.tensor([0.9, 0.8, 0.7, 0.6])
ONE_CLASS = torch.zeros(4, dtype=torch.int64)


def keep(boxes, scores, classes, threshold):
    return batched_nms(boxes, scores, classes, threshold).tolist()


def padded(boxes, scores, classes, *args, **options):
    return batched_nms_padded(boxes[None], scores[None], classes[None], *args, **options)


@pytest.mark.parametrize(
    "threshold, expected", [(0.5, [0, 2]), (0.3, [0, 3]), (0.7, [0, 1, 2, 3]), (0.0, [0])]
)
def test_chain_of_boxes(threshold, expected):
    # At 0.5, the first box suppresses the second, which therefore cannot suppress the third.
    assert keep(CHAIN, FALLING, ONE_CLASS, threshold) == expected
    detections = padded(CHAIN, FALLING, ONE_CLASS, threshold)
    assert torch.equal(detections.boxes[0, : len(expected)], CHAIN[expected])
    assert detections.counts.tolist() == [len(expected)]


def test_result_is_sorted_by_descending_score_and_ties_keep_their_order():
    scores = torch.tensor([0.5, 0.9, 0.5, 0.9])
    far = torch.arange(4)[:, None] * 10.0 + torch.tensor([0.0, 0, 5, 5])
    assert keep(far, scores, ONE_CLASS, 0.5) == [1, 3, 0, 2]
    assert torch.equal(padded(far, scores, ONE_CLASS).boxes[0, :4], far[[1, 3, 0, 2]])


def test_iou_equal_to_the_threshold_does_not_suppress():
    boxes = torch.tensor([[0.0, 0, 4, 2], [0, 0, 2, 2]])  # IoU exactly 1/2
    assert keep(boxes, FALLING[:2], ONE_CLASS[:2], 0.5) == [0, 1]
    assert keep(boxes, FALLING[:2], ONE_CLASS[:2], 0.49) == [0]


@pytest.mark.parametrize("method", ["hard", "linear"])
def test_pixel_extent_adds_the_last_pixels_to_the_boxes(method):
    boxes = torch.tensor([[0.0, 0, 3, 1], [0, 0, 1, 1]])  # 3 x 1 and 1 x 1, or 4 x 2 and 2 x 2
    found = [
        padded(boxes, FALLING[:2], ONE_CLASS[:2], 0.4, method=method, pixel_extent=extent)
        for extent in (0, 1)
    ]
    second = [0.8, 0.0 if method == "hard" else 0.8 * (1 - 4 / 8)]
    assert [detections.scores[0, 1].item() for detections in found] == pytest.approx(second)
    assert torch.equal(found[0].boxes[0, :2], boxes)


def test_classes_do_not_suppress_each_other_unless_agnostic():
    same = torch.tensor([[0.0, 0, 4, 4]]).repeat(4, 1)
    classes = torch.tensor([7, 7, 3, 7])
    assert keep(same, FALLING, classes, 0.5) == [0, 2]
    assert padded(same, FALLING, classes).classes[0, :3].tolist() == [7, 3, -1]
    agnostic = padded(same, FALLING, classes, class_agnostic=True)
    assert agnostic.classes[0, :2].tolist() == [7, -1]


def test_negative_coordinates_do_not_mix_classes():
    # Other implementations shift boxes by class, which makes these two coincide.
    boxes = torch.tensor([[0.0, 0, 10, 10], [-11, -11, -1, -1]])
    assert keep(boxes, FALLING[:2], torch.tensor([0, 1]), 0.5) == [0, 1]


@pytest.mark.parametrize("bad", [[2.0, 2, 2, 2], [math.nan, 0, 4, 4]])
def test_box_without_area_or_with_nan_neither_suppresses_nor_is_suppressed(bad):
    boxes = torch.tensor([[0.0, 0, 4, 4], bad, bad, [0, 0, 4, 4]])
    assert keep(boxes, FALLING, ONE_CLASS, 0.1) == [0, 1, 2]
    assert padded(boxes, FALLING, ONE_CLASS, 0.1).counts.tolist() == [3]


def test_infinite_box_does_not_hang_or_crash():
    boxes = torch.tensor([[-math.inf, -math.inf, math.inf, math.inf], [0.0, 0, 4, 4]])
    assert 0 in keep(boxes, FALLING[:2], ONE_CLASS[:2], 0.5)


def test_padded_nms_never_selects_nan_scores():
    scores = torch.tensor([0.9, math.nan, 0.7, math.nan])
    far = torch.arange(4)[:, None] * 10.0 + torch.tensor([0.0, 0, 5, 5])
    detections = padded(far, scores, ONE_CLASS)
    assert detections.counts.tolist() == [2]
    assert detections.scores[0, :3].tolist() == pytest.approx([0.9, 0.7, 0])


def test_empty_slots_are_skipped_and_the_rest_is_padded():
    classes = torch.tensor([-1, 0, -1, 1])
    detections = padded(CHAIN, FALLING, classes, 0.5, 6)
    assert detections.boxes.shape == (1, 6, 4) and detections.counts.tolist() == [2]
    assert detections.classes.tolist() == [[0, 1, -1, -1, -1, -1]]
    assert detections.scores[0].tolist() == pytest.approx([0.8, 0.6, 0, 0, 0, 0])
    assert (detections.boxes[0, 2:] == 0).all()


@pytest.mark.parametrize("images, boxes", [(0, 3), (2, 0), (0, 0)])
def test_no_images_or_no_boxes(images, boxes):
    detections = batched_nms_padded(
        torch.zeros(images, boxes, 4), torch.zeros(images, boxes),
        torch.zeros(images, boxes, dtype=torch.int64), max_detections=5,
    )  # fmt: skip
    assert detections.boxes.shape == (images, 5, 4) and detections.counts.sum() == 0
    assert keep(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), 0.5) == []


@pytest.mark.parametrize("count, classes", [(0, 1), (120, 1), (120, 3), (120, 80)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_both_forms_keep_the_same_boxes_as_torchvision(count, classes, threshold):
    torchvision = pytest.importorskip("torchvision")
    boxes, scores = inputs.boxes(count, 64, 64), torch.rand(count)
    labels = torch.randint(classes, (count,))
    expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, labels, threshold)
    assert torch.equal(batched_nms(boxes, scores, labels, threshold), expected)
    detections = padded(boxes, scores, labels, threshold, max_detections=200)
    for found, given in ((detections.boxes, boxes), (detections.classes, labels)):
        assert torch.equal(found[0, : detections.counts[0]], given[expected])


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64, torch.bfloat16])
def test_groups_of_any_dtype_are_compared_by_value(dtype):
    same = torch.tensor([[0.0, 0, 4, 4]]).repeat(4, 1)
    groups = torch.tensor([0.0, -0.0, -3, 0]).to(dtype)
    assert keep(same, FALLING, groups, 0.5) == [0, 2]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_empty_boxes_of_any_shape_keep_nothing_as_in_torchvision(shape):
    arguments = torch.empty(shape), None, None, None
    assert torch.equal(batched_nms(*arguments), torch.empty(0, dtype=torch.int64))
    torchvision = pytest.importorskip("torchvision")
    assert torch.equal(batched_nms(*arguments), torchvision.ops.batched_nms(*arguments))


def test_linear_soft_nms_lowers_scores_of_overlapping_boxes():
    detections = padded(CHAIN[:3], FALLING[:3], ONE_CLASS[:3], 0.5, method="linear")
    # The second falls to 0.8 * (1 - 3/5); the third, with IoU 1/3 to the first, keeps 0.7 until it
    # is selected, and then lowers the second again.
    assert detections.scores[0, :3].tolist() == pytest.approx([0.9, 0.7, 0.8 * 0.4 * 0.4], rel=1e-5)


@pytest.mark.parametrize("min_score, kept", [(0.249, 2), (0.25, 1)])
def test_soft_nms_drops_scores_at_or_below_the_minimum(min_score, kept):
    boxes, scores = torch.tensor([[0.0, 0, 4, 2], [0, 0, 2, 2]]), torch.tensor([1.0, 0.5])
    options = {"method": "linear", "min_score": min_score}  # 0.5 falls to 0.25
    assert padded(boxes, scores, ONE_CLASS[:2], 0.4, **options).counts.tolist() == [kept]


@pytest.mark.parametrize("sigma", [0.5, 0.1])
def test_gaussian_soft_nms_lowers_all_scores_and_drops_low_ones(sigma):
    detections = padded(CHAIN[:2], FALLING[:2], ONE_CLASS[:2], method="gaussian", sigma=sigma)
    lowered = 0.8 * math.exp(-((3 / 5) ** 2) / sigma)
    assert detections.scores[0, :2].tolist() == pytest.approx([0.9, lowered], rel=1e-5)
    dropped = padded(CHAIN[:2], FALLING[:2], ONE_CLASS[:2], method="gaussian", min_score=0.5)
    assert dropped.counts.tolist() == [1]


BOXES = torch.zeros(1, 2, 4)
SCORES = torch.zeros(1, 2)
CLASSES = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((BOXES[0], SCORES, CLASSES), {}, r"boxes must be float32 Tensor\[B, N, 4\]"),
        ((BOXES.half(), SCORES, CLASSES), {}, r"got float16 .*; cast with .float\(\)"),
        ((BOXES, SCORES[:, :1], CLASSES), {}, r"scores must be float32 Tensor\[1, 2\]"),
        ((BOXES, SCORES, CLASSES.int()), {}, r"classes must be int64 Tensor\[1, 2\]"),
        ((BOXES, SCORES, CLASSES, 1.5), {}, "iou_threshold must be a number in"),
        ((BOXES, SCORES, CLASSES, 0.5, 0), {}, "max_detections must be an integer >= 1"),
        (
            (BOXES, SCORES, CLASSES),
            {"method": "fast"},
            "method must be one of hard, linear, gaussian",
        ),
        ((BOXES, SCORES, CLASSES), {"sigma": 0}, "sigma must be > 0"),
        ((BOXES, SCORES, CLASSES), {"min_score": 2}, "min_score must be a number in"),
        ((BOXES, SCORES, CLASSES), {"pixel_extent": 0.5}, "pixel_extent must be 0 or 1"),
    ],
)
def test_padded_nms_error_names_the_invalid_argument(arguments, options, message):
    with pytest.raises(ValueError, match=f"batched_nms_padded: .*{message}"):
        batched_nms_padded(*arguments, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((BOXES, SCORES[0], CLASSES[0], 0.5), r"boxes must be .* Tensor\[N, 4\]"),
        ((BOXES[0], SCORES[0, :1], CLASSES[0], 0.5), r"scores must be .* Tensor\[2\]"),
        ((BOXES[0], SCORES[0], CLASSES[0] > 0, 0.5), r"idxs must be int64 or .* Tensor\[2\]"),
        ((BOXES[0], SCORES[0], None, 0.5), r"idxs must be int64 or .* Tensor\[2\]"),
        ((BOXES[0], SCORES[0], CLASSES[0], -0.1), "iou_threshold must be a number in"),
    ],
)
def test_flat_nms_error_names_the_invalid_argument(arguments, message):
    with pytest.raises(ValueError, match=f"batched_nms: {message}"):
        batched_nms(*arguments)
