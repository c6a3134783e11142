"""csrc/cuda/assign_targets.cu equals the reference bit for bit."""

import math
from itertools import chain

import pytest
import torch

from fcos_d2.ops import Targets, make_levels, reference
from tests.ops import inputs

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

K = 5
TWO_LEVELS = make_levels([(6, 37), (3, 4)], [8, 16])
TWO_RANGES = [(-1, 16), (16, math.inf)]


def run(op, boxes, classes, offsets, levels, ranges, radius=1.5, inclusive=True) -> Targets:
    """Calls a raw op, or its reference, as the public wrapper does."""
    flat = [list(chain.from_iterable(pairs)) for pairs in (levels.shapes, levels.pitches)]
    return Targets(
        *op(
            boxes, classes, offsets, flat[0], list(levels.strides), flat[1], levels.offset,
            [float(bound) for bound in chain.from_iterable(ranges)], K, float(radius), inclusive,
        )
    )  # fmt: skip


def assert_equals_reference(*arguments, **options):
    targets = run(emulated.ops().assign_targets, *arguments, **options)
    expected = run(reference.assign_targets, *arguments, **options)
    for name, ours, theirs in zip(Targets._fields, targets, expected, strict=True):
        assert torch.equal(ours, theirs), name
    return targets


@pytest.mark.parametrize("radius", [0, 1.5, 2.5, math.inf])
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("offset", [0, 0.5])
def test_conventions(radius, inclusive, offset):
    packed = inputs.ground_truth([20, 0, 7], K, integer=True)
    packed[1][::5] = -1
    levels = inputs.pyramid(offset=offset)
    targets = assert_equals_reference(*packed, levels, inputs.ranges(5), radius, inclusive)
    assert targets.counts.sum(dim=(0, 1)).min() > 0


def test_points_spaced_unlike_the_strides():
    levels = make_levels([(30, 41), (15, 21)], [8, 12], offset=0.3, image_shape=(250, 333))
    packed = inputs.ground_truth([30, 10], K, 250, 333)
    assert_equals_reference(*packed, levels, [(-1, 64), (64, math.inf)])


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 3], [600, 1], [256], [257, 512]])
def test_any_number_of_images_and_boxes(counts):
    packed = inputs.ground_truth(counts, K)
    assert_equals_reference(*packed, inputs.pyramid(96, 128, 2), inputs.ranges(2))


def test_crowds_of_equal_boxes_go_to_the_lowest_index():
    box = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    boxes, classes = box.repeat(700, 1), torch.arange(700) % K
    targets = assert_equals_reference(
        boxes, classes, torch.tensor([0, 300, 700]), TWO_LEVELS, TWO_RANGES, radius=0
    )
    assert set(targets.matched.flatten().tolist()) == {-1, 0, 300}


@pytest.mark.parametrize("shapes", [[(1, 1)], [(0, 5), (3, 3)], [(8, 32), (9, 33)], [(7, 31)] * 8])
def test_maps_of_any_size(shapes):
    levels = make_levels(shapes, [8] * len(shapes))
    packed = inputs.ground_truth([5, 2], K, 72, 264)
    assert_equals_reference(*packed, levels, [(-1, math.inf)] * len(shapes))


@pytest.mark.parametrize("label", [2, -1])
@pytest.mark.parametrize("radius", [0, 1.5])
def test_boxes_that_are_no_boxes(label, radius):
    nan, inf, huge = math.nan, math.inf, 3e38
    boxes = torch.tensor(
        [
            [10, 10, 10, 30], [10, 10, 10, 10], [30, 30, 0, 0], [nan, 0, 32, 32], [0, 0, 32, nan],
            [nan] * 4, [-inf, -inf, inf, inf], [0, 0, inf, 5], [-1e30, -1e30, 1e30, 1e30],
            [-1e-30, -1e-30, 1e-30, 1e-30], [1e38, 0, huge, 1e-3], [-huge, -1, huge, 1],
            [0, 0, 16, 16],
        ]
    )  # fmt: skip
    classes = torch.full((len(boxes),), label)
    levels = TWO_LEVELS._replace(offset=0.0)
    offsets = torch.tensor([0, len(boxes)])
    assert_equals_reference(boxes, classes, offsets, levels, TWO_RANGES, radius=radius)


def test_strided_ground_truth():
    boxes, classes, offsets = inputs.ground_truth([9, 4], K)
    wide = torch.cat((boxes, boxes), dim=1)[:, :4]
    assert_equals_reference(wide, classes, offsets, inputs.pyramid(), inputs.ranges(5))
    shifted = torch.cat((torch.zeros(1), boxes.flatten()))[1:].view(-1, 4)  # not 16-byte aligned
    assert_equals_reference(shifted, classes, offsets, inputs.pyramid(), inputs.ranges(5))


def test_order_of_blocks_and_threads_changes_nothing():
    packed = inputs.ground_truth([300, 40], K, 96, 128, integer=True)
    arguments = (*packed, inputs.pyramid(96, 128, 2), inputs.ranges(2))
    expected = run(emulated.ops().assign_targets, *arguments)
    for number in range(1, 6):
        with emulated.schedule(number):
            targets = run(emulated.ops().assign_targets, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))


@pytest.mark.parametrize(
    "classes, offsets, message",
    [
        ([0, 0], [0, 2, 1, 2], "gt_offsets must rise from 0 to"),
        ([0, 0], [1, 2], "gt_offsets must rise from 0 to"),
        ([0, 0], [-1, 2], "gt_offsets must rise from 0 to"),
    ],
)
def test_bad_value_stops_the_kernel(classes, offsets, message):
    arguments = (torch.zeros(2, 4), torch.tensor(classes), torch.tensor(offsets))
    with pytest.raises(RuntimeError, match=f"assign_targets: {message}"):
        run(emulated.ops().assign_targets, *arguments, TWO_LEVELS, TWO_RANGES)


def test_more_levels_than_the_kernel_takes_is_an_error():
    levels = make_levels([(1, 1)] * 9, [8] * 9)
    packed = inputs.ground_truth([1], K)
    with pytest.raises(RuntimeError, match="expected at most 8 levels, got 9"):
        run(emulated.ops().assign_targets, *packed, levels, [(-1, math.inf)] * 9)
