"""csrc/cuda/batched_nms.cu keeps what greedy suppression in float64 keeps, with the CPU's bits."""

import math

import pytest
import torch

from fcos_d2.ops import backend, reference
from fcos_d2.ops.batched_nms import NMS_METHODS
from tests.ops import oracles

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

HAS_CPU_KERNEL = backend()["batched_nms"]["CPU"] == "compiled"


def overlapping(count):
    size = torch.rand(count, 2) * 30 + 2
    corner = torch.rand(count, 2) * 40 - 20
    return torch.cat((corner, corner + size), dim=1)


def with_infinities(count):
    boxes = overlapping(count)
    kind = torch.randint(40, boxes.shape)
    for i, special in enumerate((math.nan, math.inf, -math.inf)):
        boxes = torch.where(kind == i, special, boxes)
    return boxes


# Boxes of several kinds; those of integers meet thresholds exactly.
BOXES = {
    "overlapping": overlapping,
    "integers": lambda count: torch.cat(
        (corner := torch.randint(4, (count, 2)), corner + torch.randint(5, (count, 2))), dim=1
    ).float(),
    "one": lambda count: overlapping(1).expand(count, 4),
    "far": lambda count: overlapping(count) + torch.arange(count)[:, None] * 100.0,
    "chain": lambda count: torch.arange(count)[:, None] + torch.tensor([0.0, 0, 4, 4]),
    "infinities": with_infinities,
}
SCORES = {
    "different": torch.rand,
    "ties": lambda count: torch.randint(5, (count,)) / 5,
    "all equal": lambda count: torch.full((count,), 0.5),
    "negative": torch.randn,
    "special": lambda count: torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0])[
        torch.randint(6, (count,))
    ],
}


def greedy(boxes, scores, groups, threshold):
    """The kept indices in float64; None where they hang on rounding."""
    inter, union = oracles.overlaps(boxes)
    is_exact = bool((boxes == boxes.round()).all()) and threshold in (0.0, 0.25, 0.5, 1.0)
    if not boxes.isfinite().all():
        return None
    if not is_exact and oracles.is_close_call(inter, union, threshold):
        return None
    rivals = (groups[:, None] == groups[None]).numpy()
    return oracles.greedy(oracles.order_of(scores), inter, union, rivals, threshold)


def assert_flat_is_greedy(boxes, scores, groups, threshold):
    kept = emulated.ops().batched_nms(boxes, scores, groups, threshold)
    assert kept.dtype == torch.int64
    if HAS_CPU_KERNEL:
        assert torch.equal(kept, torch.ops.fcos_d2.batched_nms(boxes, scores, groups, threshold))
    expected = greedy(boxes, scores, groups, threshold)
    assert expected is None or kept.tolist() == expected
    return kept


def padded_arguments(boxes, scores, classes, threshold=0.5, detections=100, **options):
    return (
        boxes, scores, classes, threshold, detections, options.get("class_agnostic", False),
        options.get("method", "hard"), options.get("sigma", 0.5), options.get("min_score", 0.001),
    )  # fmt: skip


def run_padded(*arguments, **options):
    """The emulated op; it must have the bits of the CPU's."""
    arguments = padded_arguments(*arguments, **options)
    found = emulated.ops().batched_nms_padded(*arguments)
    if HAS_CPU_KERNEL:
        expected = torch.ops.fcos_d2.batched_nms_padded(*arguments)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    return found


def assert_holds(found, image, boxes, scores, classes):
    """Checks that an image has these detections and nothing else."""
    count = len(scores)
    assert found[3][image] == count and found[3].dtype == torch.int32
    assert torch.equal(found[0][image, :count], boxes)
    assert torch.equal(found[2][image, :count], classes)
    torch.testing.assert_close(found[1][image, :count], scores, rtol=1e-5, atol=1e-12)
    assert (found[0][image, count:] == 0).all() and (found[1][image, count:] == 0).all()
    assert (found[2][image, count:] == -1).all()


def assert_padded_is_greedy(boxes, scores, classes, threshold, detections, class_agnostic=False):
    options = {"class_agnostic": class_agnostic}
    found = run_padded(boxes, scores, classes, threshold, detections, **options)
    for b in range(len(boxes)):
        valid = (classes[b] >= 0) & (scores[b] > -math.inf)
        candidates = [x[b][valid] for x in (boxes, scores, classes)]
        groups = torch.zeros_like(candidates[2]) if class_agnostic else candidates[2]
        kept = greedy(*candidates[:2], groups, threshold)
        if kept is not None:
            assert_holds(found, b, *(x[kept[:detections]] for x in candidates))


def assert_padded_is_soft_greedy(boxes, scores, classes, threshold, detections, **options):
    options = {"class_agnostic": False, "sigma": 0.5, "min_score": 0.001, **options}
    *found, counts = run_padded(boxes, scores, classes, threshold, detections, **options)
    if not boxes.isfinite().all() or scores.isinf().any():
        return
    limits = {"iou_threshold": threshold, "max_detections": detections}
    for b, count in enumerate(counts):
        detected = [x[b, :count] for x in found]
        oracles.check_soft_nms(boxes[b], scores[b], classes[b], detected, {**limits, **options})


def random_batch(images, count, kind="overlapping", scores="different", num_classes=3, empty=0.1):
    """(boxes, scores, classes) with some slots empty."""
    classes = torch.randint(num_classes, (images, count))
    return (
        torch.stack([BOXES[kind](count) for _ in range(images)]),
        torch.stack([SCORES[scores](count) for _ in range(images)]),
        torch.where(torch.rand(images, count) < empty, -1, classes),
    )


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.6, 1.0])
def test_both_forms_are_greedy(kind, scores, threshold):
    boxes, values, classes = random_batch(1, 150, kind, scores)
    assert_flat_is_greedy(boxes[0], values[0], classes[0], threshold)
    assert_padded_is_greedy(boxes, values, classes, threshold, 20)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("num_classes", [1, 100])
def test_sizes(count, num_classes):
    boxes, scores, classes = random_batch(2, count, num_classes=num_classes)
    assert_padded_is_greedy(boxes, scores, classes, 0.5, 100)
    assert_padded_is_soft_greedy(boxes, scores, classes, 0.5, 30, method="linear")
    assert_flat_is_greedy(boxes.flatten(0, 1), scores.flatten(), classes.flatten(), 0.5)


@pytest.mark.parametrize("detections", [1, 63, 64, 65, 2000])
@pytest.mark.parametrize("scores", ["different", "all equal"])
def test_more_boxes_than_are_sorted_at_a_time(detections, scores):
    batch = random_batch(1, 1800, "far", scores)
    assert_padded_is_greedy(*batch, 0.5, detections)


def test_search_goes_on_until_the_slots_are_full():
    """The best 1,200 boxes suppress each other; what fills the slots comes after them."""
    boxes, _, classes = random_batch(1, 1500, "far", num_classes=1, empty=0)
    boxes[0, :1200] = boxes[0, 0]
    scores = torch.linspace(1, 0, 1500)[None]
    found = run_padded(boxes, scores, classes, 0.5, 10)
    assert torch.equal(found[0][0], boxes[0, [0, *range(1200, 1209)]])


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("kind", BOXES)
def test_soft_suppression(method, class_agnostic, kind):
    batch = random_batch(2, 60, kind)
    options = {"method": method, "class_agnostic": class_agnostic}
    assert_padded_is_soft_greedy(*batch, 0.3, 25, **options)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("scores", SCORES)
def test_soft_suppression_has_the_bits_of_the_cpu_for_any_scores(method, scores):
    batch = random_batch(2, 60, "infinities", scores)
    run_padded(*batch, 0.3, 80, method=method, min_score=0.0, sigma=0.01)


def test_classes_of_any_number_are_apart():
    boxes, scores, _ = random_batch(1, 40, "one")
    classes = torch.tensor([0, 2**32, 2**62, 1]).repeat(10)[None]
    found = run_padded(boxes, scores, classes, 0.5)
    assert found[3].tolist() == [4] and set(found[2][0, :4].tolist()) == set(classes[0].tolist())
    assert len(assert_flat_is_greedy(boxes[0], scores[0], classes[0], 0.5)) == 4
    assert len(assert_flat_is_greedy(boxes[0], scores[0], -classes[0], 0.5)) == 4


@pytest.mark.parametrize("distance", [1, 512, 1024, 2**32])
def test_kept_boxes_suppress_none_of_other_classes(distance):
    """Classes that are told apart only at the second look, with the same boxes, in turns of 64."""
    boxes = BOXES["one"](320)[None]
    classes = (torch.arange(320) // 64 * distance)[None]
    scores = torch.linspace(1, 0.5, 320)[None]
    for order in (torch.arange(320), torch.randperm(320)):
        found = run_padded(boxes, scores, classes[:, order], 0.5)
        assert found[3].tolist() == [5] and found[2][0, :5].unique().numel() == 5
    assert run_padded(boxes, scores, classes, 0.5, class_agnostic=True)[3].tolist() == [1]


@pytest.mark.parametrize("num_classes", [1, 5, 80])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_many_kept_boxes(num_classes, class_agnostic):
    """More of them than the threads that compare with them."""
    boxes, scores, classes = random_batch(1, 1000, num_classes=num_classes)
    boxes = boxes * 0.2 + torch.randint(40, (1, 1000, 1)) * torch.tensor([20.0, 0, 20, 0])
    assert_padded_is_greedy(boxes, scores, classes, 0.3, 1000, class_agnostic)


@pytest.mark.parametrize("num_groups", [1, 3, 1000])
def test_flat_form_waits_for_earlier_boxes_of_a_group(num_groups):
    boxes = overlapping(700)
    assert_flat_is_greedy(boxes, torch.rand(700), torch.randint(num_groups, (700,)), 0.5)


@pytest.mark.parametrize(
    "sizes",
    [
        [64, 64, 64],  # begin and end with the 64 boxes that a block takes
        [63, 65, 64, 1],
        [1, 200, 1, 150],  # go on for blocks
        [100, 20, 20, 20, 100],  # begin and end inside of one block
        [32, 64, 32, 128],  # begin with the second word of a block
        [31, 66, 33, 62, 200],
    ],
)
def test_flat_form_knows_where_groups_begin_and_end(sizes):
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    boxes, scores = overlapping(len(groups)), torch.rand(len(groups))
    kept = assert_flat_is_greedy(boxes, scores, groups, 0.3)
    with emulated.schedule(1):
        assert torch.equal(emulated.ops().batched_nms(boxes, scores, groups, 0.3), kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_flat_form_takes_other_dtypes(dtype):
    boxes, scores = overlapping(100).to(dtype), torch.rand(100).to(dtype)
    groups = torch.randint(3, (100,))
    kept = emulated.ops().batched_nms(boxes, scores, groups, 0.5)
    assert torch.equal(kept, reference.batched_nms(boxes, scores, groups, 0.5))


def test_tensors_of_any_layout():
    boxes, scores, classes = random_batch(2, 50)
    expected = run_padded(boxes, scores, classes)
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    found = run_padded(strided, scores.t().contiguous().t(), classes.t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    kept = emulated.ops().batched_nms(strided[0], scores[0], classes[0], 0.5)
    assert torch.equal(kept, emulated.ops().batched_nms(boxes[0], scores[0], classes[0], 0.5))


@pytest.mark.parametrize("method", NMS_METHODS)
def test_order_of_blocks_and_threads_changes_no_bit(method):
    batch = random_batch(3, 200, scores="ties")
    expected = run_padded(*batch, method=method)
    flat = [x.flatten(0, 1) for x in batch]
    kept = emulated.ops().batched_nms(*flat, 0.5)
    for number in range(1, 5):
        with emulated.schedule(number):
            found = run_padded(*batch, method=method)
            assert torch.equal(emulated.ops().batched_nms(*flat, 0.5), kept)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_shuffled_boxes_give_the_same_detections():
    boxes, scores, classes = random_batch(1, 200)
    order = torch.randperm(200)
    found = run_padded(boxes[:, order], scores[:, order], classes[:, order])
    expected = run_padded(boxes, scores, classes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    kept = emulated.ops().batched_nms(boxes[0, order], scores[0, order], classes[0, order], 0.5)
    wanted = emulated.ops().batched_nms(boxes[0], scores[0], classes[0], 0.5)
    assert torch.equal(order[kept], wanted)
