"""Independent implementations of the ops: dense and in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fcos_d2.ops import Levels, point_coordinates

TOLERANCE = 1e-6  # scores this close may be in either order
SMALLEST = 1e-37  # smaller scores may underflow to 0


# ---- assign_targets ----


def assign(
    boxes: Tensor, classes: Tensor, offsets: Tensor, levels: Levels, ranges, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns labels, matched, ambiguous [B, P] from the full matrix of points and boxes."""
    rows = [
        _assign_image(boxes[first:last], classes[first:last], first, levels, ranges, **options)
        for first, last in pairwise(offsets.tolist())
    ]
    none = torch.zeros(0, levels.num_points)
    return tuple(torch.stack(column) for column in zip(*rows, strict=True)) or (none,) * 3


def _assign_image(
    boxes, classes, first, levels, ranges, *, num_classes, center_radius, inclusive, pixel_extent
) -> tuple[Tensor, Tensor, Tensor]:
    per_point = torch.tensor(levels.points_per_level)
    points = point_coordinates(levels)[:, None]  # [P, 1, 2]
    stride = torch.tensor(levels.strides).float().repeat_interleave(per_point)[:, None]
    bounds = torch.tensor(ranges).float().repeat_interleave(per_point, dim=0)
    low, high = bounds[:, :1], bounds[:, 1:]
    x1y1, x2y2 = boxes[:, :2], boxes[:, 2:]
    sides = torch.cat((points - x1y1, x2y2 - points), dim=-1)  # [P, M, 4]
    inside = (sides > 0).all(dim=-1)
    size = sides.max(dim=-1).values
    in_range = (size >= low) & (size <= high) if inclusive else (size > low) & (size < high)
    area = (x2y2 + pixel_extent - x1y1).prod(dim=1)
    good = inside & in_range & (classes != -1) & area.isfinite()
    if center_radius > 0:
        away = (points - (x1y1 + x2y2) / 2).abs()
        good &= (away < center_radius * stride[..., None]).all(dim=-1)
    count = good.sum(dim=1)
    # An extra box with infinite area means "none"; argmin returns the first of equal values.
    areas = torch.where(good, area, math.inf)
    areas = torch.cat((areas, torch.full((len(areas), 1), math.inf)), dim=1)
    best = areas.argmin(dim=1)
    ignored = (inside & (classes == -1)).any(dim=1)
    background = torch.where(ignored, -1, num_classes)
    labels = torch.where(count > 0, torch.cat((classes, classes.new_zeros(1)))[best], background)
    return labels.int(), torch.where(count > 0, best + first, -1).int(), count > 1


# ---- select_candidates ----


def scores_of(logits: Tensor, quality: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns class probabilities and products with quality of one image and level, [H W K]."""
    cls = torch.sigmoid(logits.float().double()).flatten(1).t()
    product = cls * torch.sigmoid(quality.float().double()).flatten()[:, None]
    return cls.flatten().numpy(), product.flatten().numpy()


def check_selection(
    index: np.ndarray, scores: Tensor, logits: Tensor, quality: Tensor, slots: int, options: dict
) -> None:
    """Checks the selected pairs of one image and level, in order; index = point * K + class."""
    cls, product = scores_of(logits, quality)
    tested = product if options["threshold_with_quality"] else cls
    rank = product if options["rank_with_quality"] else cls
    threshold = options["score_threshold"]
    valid = ~np.isnan(product)
    may = valid & (tested > threshold * (1 - TOLERANCE))
    must = valid & (tested > max(threshold * (1 + TOLERANCE), SMALLEST))
    chosen = np.zeros(len(cls), dtype=bool)
    chosen[index] = True
    assert chosen.sum() == len(index), "a pair was selected twice"
    assert may[index].all(), "a pair below the threshold was selected"
    ceiling = rank[index] * (1 + TOLERANCE) + SMALLEST
    assert (rank[index][1:] <= ceiling[:-1]).all(), "not by descending rank"
    left_out = rank[must & ~chosen]
    if len(index) < slots:
        assert len(left_out) == 0, "a pair above the threshold is missing"
    elif len(left_out) and slots:
        assert left_out.max() <= ceiling.min(), "a better pair was not selected"
    want = {"cls": cls, "product": product, "sqrt": product**0.5}[options["score_rule"]][index]
    np.testing.assert_allclose(scores.double(), want, rtol=TOLERANCE, atol=SMALLEST**0.5)


def check_tie_order(index: np.ndarray, logits: Tensor, quality: Tensor) -> None:
    """Checks that of pairs with equal logits, those with the lowest indices come first."""
    valid = ~np.isnan(scores_of(logits, quality)[1])
    inputs = torch.broadcast_tensors(logits.flatten(1).t(), quality.flatten()[:, None])
    inputs = torch.stack(inputs, dim=-1).flatten(0, 1).float().numpy()
    group = np.unique(inputs, axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(group, kind="stable")
    order = order[valid[order]]
    place = np.full(len(inputs), len(inputs))  # pairs that were not selected come last
    place[index] = np.arange(len(index))
    first, second = order[:-1], order[1:]
    is_out_of_order = (group[first] == group[second]) & (place[second] < place[first])
    assert not is_out_of_order.any(), "a pair was selected before an equal one with a lower index"


# ---- batched_nms ----


def order_of(scores: Tensor) -> list[int]:
    """Returns indices by descending score; NaN first, ties by ascending index."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (values[i] == values[i], -values[i], i))


def overlaps(boxes: Tensor, pixel_extent: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Computes intersections and unions of all pairs in float64, from float32 coordinates."""
    b = (boxes.float() + torch.tensor([0.0, 0, pixel_extent, pixel_extent])).double().numpy()
    top_left = np.maximum(b[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(b[:, None, 2:], b[None, :, 2:])
    with np.errstate(invalid="ignore"):  # of infinite coordinates
        inter = (bottom_right - top_left).clip(min=0).prod(axis=2)
        area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        return inter, area[:, None] + area[None] - inter


def is_close_call(inter: np.ndarray, union: np.ndarray, threshold: float) -> bool:
    """Returns whether an IoU of overlapping boxes is within TOLERANCE of the threshold."""
    iou = np.divide(inter, union, out=np.zeros_like(inter), where=(union > 0) & (inter > 0))
    np.fill_diagonal(iou, -1)
    return bool(((np.abs(iou - threshold) < TOLERANCE) & (inter > 0)).any())


def greedy(order: list[int], inter, union, rivals: np.ndarray, threshold: float) -> list[int]:
    """Returns the kept boxes; ``rivals[i, j]`` if i and j can suppress each other."""
    kept = []
    for i in order:
        if not any(rivals[i, j] and inter[i, j] > threshold * union[i, j] for j in kept):
            kept.append(i)
    return kept


def check_soft_nms(boxes, scores, classes, found, options: dict) -> None:
    """Checks that every detection of an image was the best remaining one when it was selected.

    Stops where rounding may decide: at an IoU near the threshold, or a score near ``min_score``.
    """
    inter, union = overlaps(boxes, options.get("pixel_extent", 0))
    if is_close_call(inter, union, options["iou_threshold"]):
        return
    iou = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    rivals = (classes[:, None] == classes[None]).numpy() | options["class_agnostic"]
    alive = scores.double().numpy().copy()
    alive[np.isnan(alive) | (classes.numpy() < 0)] = -math.inf
    for box, score, label in zip(*found, strict=True):
        same = (boxes == box).all(dim=1).numpy() & (classes == label).numpy()
        candidates = np.flatnonzero(same & (np.abs(alive - float(score)) <= TOLERANCE))
        assert len(candidates), "the box is not among the remaining ones"
        best = candidates[0]
        assert alive[best] >= alive.max() - TOLERANCE, "not the best remaining box"
        alive[best] = -math.inf
        if options["method"] == "gaussian":
            alive = np.where(
                rivals[best], alive * np.exp(-(iou[best] ** 2) / options["sigma"]), alive
            )
        else:
            lower = rivals[best] & (inter[best] > options["iou_threshold"] * union[best])
            lower &= np.isfinite(alive)
            np.multiply(alive, 1 - iou[best], out=alive, where=lower)
        if (np.abs(alive - options["min_score"]) <= TOLERANCE).any():
            return
        alive[~(alive > options["min_score"])] = -math.inf
    if len(found[0]) < options["max_detections"]:
        assert alive.max(initial=-math.inf) == -math.inf, "a remaining box was not selected"
