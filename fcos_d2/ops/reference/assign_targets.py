"""assign_targets (1904.01355 sections 3.1 and 3.2, 2006.09214 section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..levels import Levels, point_coordinates, spread_over_points
from ._common import area, levels_of

BOXES_PER_CHUNK = 64  # bounds memory to O(P), independent of M


def assign_targets(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_offsets: Tensor,
    shapes: list[int],
    strides: list[int],
    pitches: list[int],
    offset: float,
    size_ranges: list[float],
    num_classes: int,
    center_radius: float,
    inclusive: bool,
    pixel_extent: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``fcos_d2.ops.assign_targets``; lists of pairs are flattened."""
    _check_ground_truth(gt_boxes, gt_classes, gt_offsets, num_classes)
    levels = levels_of(shapes, strides, pitches, offset)
    device, num_boxes = gt_boxes.device, gt_boxes.shape[0]
    points = point_coordinates(levels, device)
    stride, low, high = (
        spread_over_points(values, levels, device)
        for values in (strides, size_ranges[0::2], size_ranges[1::2])
    )
    image_of_box = torch.searchsorted(
        gt_offsets[1:].contiguous(), torch.arange(num_boxes, device=device), right=True
    )
    size = (gt_offsets.shape[0] - 1, levels.num_points)
    smallest = torch.full(size, math.inf, device=device)  # area
    matched = torch.full(size, num_boxes, device=device)  # M stands for "none"
    candidates, ignored = torch.zeros_like(matched), torch.zeros_like(matched)  # counts
    for first in range(0, num_boxes, BOXES_PER_CHUNK):
        chunk = slice(first, first + BOXES_PER_CHUNK)
        boxes, is_region = gt_boxes[chunk, None], gt_classes[chunk, None] == -1
        image = image_of_box[chunk, None].expand(-1, levels.num_points)
        areas = area(boxes, pixel_extent)
        inside, fits = _qualify(points, boxes, stride, low, high, center_radius, inclusive)
        candidate = inside & fits & ~is_region & areas.isfinite()
        areas, index = _choose(torch.where(candidate, areas, math.inf), image, first, smallest)
        better = areas < smallest  # on a tie the earlier chunk has the lower index
        matched = torch.where(better, index, matched)
        smallest = torch.where(better, areas, smallest)
        candidates.scatter_add_(0, image, candidate.long())
        ignored.scatter_add_(0, image, (inside & is_region).long())
    background = torch.where(ignored > 0, -1, num_classes)
    return _gather(gt_boxes, gt_classes, matched, background, candidates > 1, points, levels)


def _qualify(
    points: Tensor,
    boxes: Tensor,
    stride: Tensor,
    low: Tensor,
    high: Tensor,
    center_radius: float,
    inclusive: bool,
) -> tuple[Tensor, Tensor]:
    """Returns which points [P, 2] lie inside boxes [m, 1, 4], and which pass the other tests."""
    sides = _sides(points, boxes)  # [m, P, 4] in pixels
    longest = sides.amax(dim=-1)
    not_below, not_above = (torch.ge, torch.le) if inclusive else (torch.gt, torch.lt)
    fits = not_below(longest, low) & not_above(longest, high)
    if center_radius > 0:
        center = (boxes[..., :2] + boxes[..., 2:]) / 2
        fits &= (points - center).abs().amax(dim=-1) < center_radius * stride
    return sides.amin(dim=-1) > 0, fits


def _choose(areas: Tensor, image: Tensor, first: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest of the areas [m, P] per image and point, and the lowest index with it.

    Indices start at ``first``. Minima do not depend on order, so the result is deterministic.
    """
    smallest = torch.full_like(like, math.inf).scatter_reduce(0, image, areas, "amin")
    index = torch.arange(first, first + len(areas), device=areas.device)[:, None]
    last = torch.iinfo(torch.int64).max
    index = torch.where(areas == smallest.gather(0, image), index, last)
    none = torch.full_like(like, last, dtype=torch.int64)
    return smallest, none.scatter_reduce(0, image, index, "amin")


def _gather(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    matched: Tensor,
    background: Tensor,
    ambiguous: Tensor,
    points: Tensor,
    levels: Levels,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of Targets."""
    positive = matched < len(gt_boxes)
    boxes = torch.cat((gt_boxes, gt_boxes.new_zeros(1, 4)))[matched]
    classes = torch.cat((gt_classes, gt_classes.new_zeros(1)))[matched]
    stride = spread_over_points(levels.strides, levels, points.device)
    ltrb = torch.where(positive[..., None], _sides(points, boxes) / stride[:, None], 0.0)
    counts = torch.stack((positive, ambiguous), dim=-1).split(levels.points_per_level, 1)
    quality = torch.where(positive, centerness(ltrb), 0.0)
    totals = torch.stack((positive.double().sum(), quality.double().sum()))
    return (
        torch.where(positive, classes, background).int(),
        torch.where(positive, matched, -1).int(),
        ltrb,
        quality,
        torch.stack([level.sum(dim=1) for level in counts], dim=1).int(),
        totals.float(),
    )


def centerness(ltrb: Tensor) -> Tensor:
    """Computes ``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`` (1904.01355 equation 3).

    Args:
        ltrb: Tensor[..., 4] of positive distances.

    Returns:
        Tensor[...] in (0, 1]: 1 in the center of the box, approaching 0 at its sides.
    """
    left, top, right, bottom = ltrb.unbind(dim=-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    # In float64, since torch's float32 sqrt is not always correctly rounded.
    return (horizontal * vertical).double().sqrt().to(ltrb.dtype)


def _check_ground_truth(boxes: Tensor, classes: Tensor, offsets: Tensor, num_classes: int) -> None:
    known = ((classes >= -1) & (classes < num_classes)).all()
    torch._assert_async(
        known,
        f"assign_targets: gt_classes must lie in [-1, {num_classes}); "
        "-1 is an ignored region, other values need a larger num_classes",
    )
    ordered = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] == 0)
    torch._assert_async(
        ordered & (offsets[-1] == boxes.shape[0]),
        f"assign_targets: gt_offsets must rise from 0 to the number of boxes, {boxes.shape[0]}",
    )


def _sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Returns the distances [..., 4] from points [..., 2] to the sides (ltrb) of boxes."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1)
