"""assign_targets: the ground-truth box that each point of the pyramid must predict."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check,
    check_count,
    check_flags,
    check_levels,
    check_number,
    check_pixel_extent,
    check_same_device,
    check_tensor,
    is_number,
)
from ._library import define_op
from .levels import Levels


class Targets(NamedTuple):
    """Training targets of every point.

    Attributes:
        labels: int32 Tensor[B, P]; class in [0, K), background K, or -1 for points to ignore.
        matched: int32 Tensor[B, P]; index into the M boxes of the batch, -1 for none.
        ltrb: float32 Tensor[B, P, 4]; distances to the sides of the matched box, in strides;
            0 for none.
        centerness: float32 Tensor[B, P] in (0, 1]; 0 for none.
        counts: int32 Tensor[B, L, 2]; number of positive points and of ambiguous points (more than
            one box qualifies) per image and level.
        totals: float32 Tensor[2]; number of positive points in the batch and the sum of their
            centerness, by which losses are divided. ``box_loss`` does not need them.
    """

    labels: Tensor
    matched: Tensor
    ltrb: Tensor
    centerness: Tensor
    counts: Tensor
    totals: Tensor | None = None


def assign_targets(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_offsets: Tensor,
    levels: Levels,
    size_ranges: Sequence[tuple[float, float]],
    *,
    num_classes: int,
    center_radius: float = 1.5,
    inclusive: bool = True,
    pixel_extent: int = 0,
) -> Targets:
    """Assigns ground truth to points, all images and levels at once (1904.01355 section 3).

    A point is positive for a box if it lies strictly inside the box, is closer than
    ``center_radius`` strides to its center in x and in y, and the largest of its four distances to
    the sides is in the size range of the point's level. If several boxes qualify, the one with the
    smallest area wins, then the one with the lowest index. Boxes without area and boxes with a
    non-finite coordinate match no point. A point that is not positive and lies strictly inside an
    ignored region is ignored.

    Args:
        gt_boxes: float32 Tensor[M, 4], boxes of all images one after the other, xyxy in pixels of
            the network input, ``x1 <= x2`` and ``y1 <= y2``; M may be 0.
        gt_classes: int64 Tensor[M] in [0, num_classes), or -1 for a region to ignore.
        gt_offsets: int64 Tensor[B + 1]; image b owns the boxes [gt_offsets[b], gt_offsets[b + 1]).
        levels: geometry of the pyramid's points (``make_levels``).
        size_ranges: (low, high) in pixels per level; use -1 and ``math.inf`` for the open ends.
        num_classes: K.
        center_radius: in strides; 0 disables center sampling (any point inside the box).
        inclusive: whether a distance equal to low or high is in the range.
        pixel_extent: added to width and height when areas are compared: 1 if x2 and y2 are the last
            pixels inside a box (the original FCOS), 0 if they are its edges.

    Returns:
        Targets, on the device of ``gt_boxes``. Not differentiable.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or value.
        RuntimeError: a class is outside [-1, num_classes), or the offsets do not ascend from 0 to M
            (checked on the device, asynchronously on GPUs).

    Example:
        >>> levels = make_levels([(2, 2)], [8])
        >>> boxes, classes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([3])
        >>> offsets = torch.tensor([0, 1])
        >>> targets = assign_targets(
        ...     boxes, classes, offsets, levels, [(-1, math.inf)], num_classes=5
        ... )
        >>> targets.labels
        tensor([[3, 5, 5, 5]], dtype=torch.int32)
    """
    name = "assign_targets"
    check_tensor(name, "gt_boxes", gt_boxes, ["M", 4], [torch.float32], "cast with .float()")
    m = gt_boxes.shape[0]
    check(m < 2**31, name, "gt_boxes must have at most 2^31 - 1 rows", gt_boxes)
    check_tensor(name, "gt_classes", gt_classes, [m], [torch.int64], "cast with .long()")
    check_tensor(name, "gt_offsets", gt_offsets, ["B + 1"], [torch.int64], "cast with .long()")
    check(gt_offsets.shape[0] > 0, name, "gt_offsets must have B + 1 >= 1 elements", gt_offsets)
    check_same_device(name, gt_boxes=gt_boxes, gt_classes=gt_classes, gt_offsets=gt_offsets)
    check_levels(name, levels)
    check(
        isinstance(size_ranges, Sequence)
        and len(size_ranges) == len(levels.strides)
        and all(map(_is_range, size_ranges)),
        name,
        f"size_ranges must be {len(levels.strides)} pairs (low <= high), one per level",
        size_ranges,
    )
    check_count(name, "num_classes", num_classes)
    check_number(name, "center_radius", center_radius, 0, float("inf"))
    check_flags(name, inclusive=inclusive)
    check_pixel_extent(name, pixel_extent)
    return Targets(
        *_op(
            gt_boxes.detach(),
            gt_classes,
            gt_offsets,
            list(chain.from_iterable(levels.shapes)),
            list(levels.strides),
            list(chain.from_iterable(levels.pitches)),
            levels.offset,
            [float(bound) for bound in chain.from_iterable(size_ranges)],
            num_classes,
            float(center_radius),
            inclusive,
            pixel_extent,
        )
    )


def _is_range(pair: object) -> bool:
    inf = float("inf")
    good = isinstance(pair, Sequence) and len(pair) == 2
    return good and is_number(pair[0], -inf, inf) and is_number(pair[1], pair[0], inf)


def _fake(gt_boxes, gt_classes, gt_offsets, shapes, *_):
    images, levels = gt_offsets.shape[0] - 1, len(shapes) // 2
    points = sum(h * w for h, w in zip(shapes[0::2], shapes[1::2], strict=True))
    return (
        gt_boxes.new_empty(images, points, dtype=torch.int32),
        gt_boxes.new_empty(images, points, dtype=torch.int32),
        gt_boxes.new_empty(images, points, 4),
        gt_boxes.new_empty(images, points),
        gt_boxes.new_empty(images, levels, 2, dtype=torch.int32),
        gt_boxes.new_empty(2),
    )


_op = define_op(
    "assign_targets(Tensor gt_boxes, Tensor gt_classes, Tensor gt_offsets, SymInt[] shapes, "
    "int[] strides, SymInt[] pitches, float offset, float[] size_ranges, int num_classes, "
    "float center_radius, bool inclusive, int pixel_extent=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.assign_targets,
    _fake,
)
