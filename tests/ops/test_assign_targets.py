"""assign_targets: hand-computed cases and invalid input."""

import math

import pytest
import torch

from fcos_d2.ops import assign_targets, make_levels

from . import inputs

K = 5
OPEN = [(-1, math.inf)]


def assign(boxes, classes=None, offsets=None, levels=None, ranges=OPEN, **options):
    """Calls assign_targets for one image, by default with one level of 4 x 4 points, stride 8."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.arange(len(boxes)) % K if classes is None else torch.tensor(classes)
    offsets = [0, len(boxes)] if offsets is None else offsets
    levels = levels or make_levels([(4, 4)], [8])
    options.setdefault("center_radius", 0)
    return assign_targets(
        boxes, classes.long(), torch.tensor(offsets), levels, ranges, num_classes=K, **options
    )


def grid(values):
    return values.view(4, 4).tolist()


def test_points_inside_a_box_are_positive_with_distances_in_strides():
    targets = assign([[0, 0, 16, 8]], classes=[3])
    assert grid(targets.labels) == [[3, 3, 5, 5], [5] * 4, [5] * 4, [5] * 4]
    assert grid(targets.matched) == [[0, 0, -1, -1], [-1] * 4, [-1] * 4, [-1] * 4]
    assert targets.ltrb[0, :2].tolist() == [[0.5, 0.5, 1.5, 0.5], [1.5, 0.5, 0.5, 0.5]]
    assert targets.centerness[0, :3].tolist() == pytest.approx([math.sqrt(1 / 3)] * 2 + [0])
    assert targets.ltrb[0, 2:].abs().sum() == 0
    assert targets.counts.tolist() == [[[2, 0]]]
    assert targets.totals.tolist() == pytest.approx([2, 2 * math.sqrt(1 / 3)])


def test_point_on_the_side_of_a_box_is_outside():
    assert (assign([[4, 0, 12, 32]]).labels == K).sum() == 16  # points lie at 4, 12, 20, 28
    assert (assign([[3.99, 0, 12.01, 32]]).labels == 0).sum() == 8


def test_centerness_is_one_in_the_middle():
    assert assign([[0, 0, 8, 8]]).centerness[0, 0] == 1


@pytest.mark.parametrize("inclusive, level_of_positive", [(True, [1, 1]), (False, [0, 0])])
def test_distance_equal_to_a_bound_is_in_both_ranges_or_neither(inclusive, level_of_positive):
    # The point (8, 8) exists on both levels; its largest distance to the box is exactly 12.
    levels = make_levels([(1, 1), (1, 1)], [16, 16])
    bounds = [(-1, 12), (12, math.inf)]
    targets = assign([[0, 0, 20, 16]], levels=levels, ranges=bounds, inclusive=inclusive)
    assert targets.counts[0, :, 0].tolist() == level_of_positive


def test_levels_match_boxes_in_their_size_range():
    levels = inputs.pyramid(256, 256, 3)
    boxes = [[96, 96, 160, 160], [50, 50, 250, 250]]  # distances of 32 to 64, and of 100 to 200
    targets = assign(boxes, levels=levels, ranges=inputs.ranges(3), center_radius=1.5)
    p3, p4, p5 = targets.labels[0].split(levels.points_per_level)
    assert set(p3.tolist()) == {0, K}
    assert 1 in p4 and 1 in p5
    assert 0 not in p5


def test_smaller_area_wins():
    targets = assign([[0, 0, 32, 32], [0, 0, 16, 16]], classes=[1, 2])
    assert grid(targets.labels) == [[2, 2, 1, 1], [2, 2, 1, 1], [1] * 4, [1] * 4]
    assert targets.counts.tolist() == [[[16, 4]]]


def test_pixel_extent_adds_the_last_pixels_to_the_area():
    boxes = [[0, 0, 64, 9], [0, 0, 24.2, 24.2]]  # 576 and 586, or 65 x 10 and 25.2 x 25.2
    matched = [assign(boxes, pixel_extent=extent).matched[0, 0] for extent in (0, 1)]
    assert matched == [0, 1]


def test_tie_goes_to_smaller_area_then_lower_index():
    boxes = [[0, 0, 32, 16], [0, 0, 16, 32], [0, 0, 32, 16]]
    targets = assign(boxes, classes=[1, 2, 3])
    assert grid(targets.matched) == [[0] * 4, [0] * 4, [1, 1, -1, -1], [1, 1, -1, -1]]


def test_ties_are_broken_across_chunks_of_boxes():
    boxes = [[0, 0, 32, 32]] * 200
    assert (assign(boxes).matched == 0).all()
    smaller_last = boxes + [[0, 0, 31, 31]]
    assert (assign(smaller_last).matched == 200).all()


def test_nearly_equal_areas_are_distinguished():
    # In float32, 1e8 - 1000 == 1e8 - 1003: peers that rank by it cannot tell these apart.
    boxes = [[0, 0, 31.34375, 32], [0, 0, 31.25, 32]]
    assert (assign(boxes, levels=make_levels([(3, 3)], [8])).matched == 1).all()


def test_center_sampling_excludes_points_at_the_radius():
    box = [[0, 0, 32, 32]]  # center (16, 16); points at distance 4 and 12
    assert (assign(box, center_radius=1.5).labels == 0).sum() == 4  # 12 is not < 12
    assert (assign(box, center_radius=1.51).labels == 0).sum() == 16
    assert (assign(box, center_radius=0).labels == 0).sum() == 16


def test_center_sampling_never_leaves_the_box():
    assert (assign([[0, 0, 7, 32]], center_radius=1.5).labels == 0).sum() == 2


def test_images_match_only_their_own_boxes():
    targets = assign([[0, 0, 8, 8], [24, 24, 32, 32]], offsets=[0, 1, 1, 2])
    assert targets.labels.shape == (3, 16)
    assert (targets.labels != K).sum(dim=1).tolist() == [1, 0, 1]
    assert targets.matched[2, 15] == 1
    assert targets.counts[:, 0, 0].tolist() == [1, 0, 1]
    assert targets.totals.tolist() == [2, 2]


def test_all_points_are_background_without_boxes():
    targets = assign([], offsets=[0, 0])
    assert (targets.labels == K).all() and (targets.matched == -1).all()
    assert targets.counts.sum() == 0
    empty_batch = assign([], offsets=[0])
    assert empty_batch.labels.shape == (0, 16)
    assert targets.totals.tolist() == empty_batch.totals.tolist() == [0, 0]


@pytest.mark.parametrize(
    "box",
    [
        [10, 10, 10, 30],
        [10, 10, 10, 10],
        [30, 30, 0, 0],
        [math.nan, 0, 32, 32],
        [0, 0, 32, math.nan],
        [-math.inf, -math.inf, math.inf, math.inf],
        [-1e30, -1e30, 1e30, 1e30],
    ],
)
def test_box_without_finite_area_matches_no_point(box):
    targets = assign([box, [0, 0, 8, 8]], classes=[1, 2])
    assert (targets.labels != K).sum() == 1 and targets.labels[0, 0] == 2
    assert targets.ltrb.isfinite().all() and targets.centerness.isfinite().all()


def test_ignored_region_affects_background_but_not_positives():
    targets = assign([[0, 0, 16, 16], [0, 0, 8, 8]], classes=[-1, 2])
    assert grid(targets.labels) == [[2, -1, 5, 5], [-1, -1, 5, 5], [5] * 4, [5] * 4]
    assert grid(targets.matched)[0] == [1, -1, -1, -1]
    assert targets.counts.tolist() == [[[1, 0]]]


def test_ignored_region_disregards_size_ranges():
    targets = assign([[0, 0, 32, 32]], classes=[-1], ranges=[(100, 200)], center_radius=1.5)
    assert (targets.labels == -1).all()


GOOD = {
    "gt_boxes": torch.zeros(2, 4),
    "gt_classes": torch.zeros(2, dtype=torch.int64),
    "gt_offsets": torch.tensor([0, 2]),
    "levels": make_levels([(1, 1)], [8]),
    "size_ranges": OPEN,
    "num_classes": K,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gt_boxes": torch.zeros(3, 5).double()},
         r"assign_targets: gt_boxes must be float32 Tensor\[M, 4\], got float64 Tensor\[3, 5\] on "
         r"cpu; cast with .float\(\)"),
        ({"gt_boxes": [[0, 0, 1, 1]]}, r"gt_boxes must be .* got list"),
        ({"gt_classes": torch.zeros(3).long()}, r"gt_classes must be int64 Tensor\[2\]"),
        ({"gt_classes": torch.zeros(2)}, r"got float32 Tensor\[2\] on cpu; cast with .long\(\)"),
        ({"gt_offsets": torch.zeros(0).long()}, "gt_offsets must have B"),
        ({"gt_classes": torch.zeros(2).long().to("meta")}, "gt_classes must be on cpu"),
        ({"levels": [(1, 1)]}, "levels must be fcos_d2.ops.Levels"),
        ({"size_ranges": OPEN * 2}, "size_ranges must be 1 pairs"),
        ({"size_ranges": [(5, 1)]}, "size_ranges must be 1 pairs"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1"),
        ({"center_radius": -1}, "center_radius must be a number in"),
        ({"pixel_extent": True}, "pixel_extent must be 0 or 1, got bool True"),
    ],
)  # fmt: skip
def test_error_names_the_invalid_argument(change, message):
    with pytest.raises(ValueError, match=message):
        assign_targets(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gt_classes": torch.tensor([0, K])}, r"gt_classes must lie in \[-1, (5|num_classes)\)"),
        ({"gt_classes": torch.tensor([-2, 0])}, r"gt_classes must lie in \[-1, (5|num_classes)\)"),
        ({"gt_offsets": torch.tensor([0, 1])}, "gt_offsets must rise from 0 to"),
        ({"gt_offsets": torch.tensor([0, 3, 2])}, "gt_offsets must rise from 0 to"),
        ({"gt_offsets": torch.tensor([1, 2])}, "gt_offsets must rise from 0 to"),
    ],
)
@pytest.mark.usefixtures("assertions_can_be_caught")
def test_error_names_the_invalid_value(change, message):
    with pytest.raises(RuntimeError, match=message):
        assign_targets(**{**GOOD, **change})
