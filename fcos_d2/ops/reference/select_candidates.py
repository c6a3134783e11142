"""select_candidates (1904.01355 section 3.1, "inference")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..levels import point_coordinates
from ._common import levels_of, maps_to_points


def select_candidates(
    logits: list[Tensor],
    ltrb: list[Tensor],
    quality: list[Tensor],
    image_sizes: Tensor,
    strides: list[int],
    pitches: list[int],
    offset: float,
    score_threshold: float,
    topk: int,
    threshold_with_quality: bool,
    rank_with_quality: bool,
    score_rule: str,
    clip: bool,
    pixel_extent: int = 0,
    drop_empty: bool = False,
    top: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``fcos_d2.ops.select_candidates``; ``top`` replaces ``top_lowest_index_first``."""
    top = top or top_lowest_index_first
    shapes = [size for level in logits for size in level.shape[2:]]
    levels = levels_of(shapes, strides, pitches, offset)
    points = point_coordinates(levels, logits[0].device).split(levels.points_per_level)
    parts = []
    for level, stride in enumerate(strides):
        cls = torch.sigmoid(maps_to_points([logits[level]]).float())  # [B, HW, K]
        product = cls * torch.sigmoid(maps_to_points([quality[level]]).float())
        passes = (product if threshold_with_quality else cls) > score_threshold
        passes &= ~product.isnan()
        rank = torch.where(passes, product if rank_with_quality else cls, -1.0).flatten(1)
        rank, index = top(rank, topk)
        score = {"cls": cls, "product": product, "sqrt": product.sqrt()}[score_rule]
        point = index // cls.shape[2]
        distances = maps_to_points([ltrb[level]]).float() * stride
        distances = distances.gather(1, point[..., None].expand(-1, -1, 4))
        center = points[level][point]
        boxes = torch.cat((center - distances[..., :2], center + distances[..., 2:]), dim=-1)
        found = (rank >= 0) & boxes.isfinite().all(dim=-1)
        parts.append((boxes, score.flatten(1).gather(1, index), index % cls.shape[2], found))
    boxes, scores, classes, found = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    if clip:
        limit = (image_sizes.flip(1).repeat(1, 2)[:, None] - pixel_extent).to(boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limit)  # (w, h, w, h)
    if drop_empty:
        found = found & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    return (
        torch.where(found[..., None], boxes, 0.0),
        torch.where(found, scores, 0.0),
        torch.where(found, classes, -1),
    )


def top_lowest_index_first(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like torch.topk on [B, n] values that are >= 0 or -1, but ties go to the lower index.

    Non-negative floats sort like their bit patterns, so packing (bits, -index) into one integer
    gives unique keys, and any correct selection returns the same result.
    """
    n = values.shape[1]
    bits = torch.where(values >= 0, values, 0.0).contiguous().view(torch.int32).long() + 1
    bits = torch.where(values >= 0, bits, 0)
    key = (bits << 32) | (n - 1 - torch.arange(n, device=values.device))
    index = n - 1 - (key.topk(torch.sym_min(k, n), dim=1).values & 0xFFFFFFFF)
    return values.gather(1, index), index
