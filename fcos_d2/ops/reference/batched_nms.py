"""batched_nms and batched_nms_padded (soft-NMS: 1704.04503)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import area


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    max_detections: int,
    *rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``fcos_d2.ops.batched_nms_padded``; ``rule`` are further arguments of ``nms_step``."""
    # An extra empty slot for the indices of empty detections to point to.
    boxes, scores = F.pad(boxes, (0, 0, 0, 1)), F.pad(scores, (0, 1))
    classes = F.pad(classes, (0, 1), value=-1)
    alive, kept = nms_start(scores, classes), []
    for _ in range(min(max_detections, scores.shape[1])):
        *best, alive = nms_step(alive, boxes, classes, iou_threshold, *rule)
        kept.append(best)
    best, index = (torch.cat(column, dim=1) for column in zip(*kept, strict=True))
    missing = (0, max_detections - len(kept))
    return nms_result(boxes, classes, F.pad(best, missing, value=-math.inf), F.pad(index, missing))


def nms_start(scores: Tensor, classes: Tensor) -> Tensor:
    """Returns the scores [B, N] of the boxes that can be kept; -inf for the others."""
    return torch.where((classes >= 0) & ~scores.isnan(), scores.float(), -math.inf)


def nms_step(
    alive: Tensor,
    boxes: Tensor,
    classes: Tensor,
    iou_threshold: float,
    class_agnostic: bool,
    method: str,
    sigma: float,
    min_score: float,
    pixel_extent: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns score and index [B, 1] of the best box, and the remaining scores [B, N]."""
    position = torch.arange(alive.shape[1], device=alive.device)
    best = alive.amax(dim=1, keepdim=True)
    index = torch.where(alive == best, position, alive.shape[1]).amin(dim=1, keepdim=True)
    box = boxes.gather(1, index[..., None].expand(-1, -1, 4)).float()
    rival = best > -math.inf
    if not class_agnostic:
        rival = rival & (classes.gather(1, index) == classes)
    alive = torch.where(position == index, -math.inf, alive)
    inter, union = _overlap(box, boxes.float(), pixel_extent)
    overlaps = rival & (inter > iou_threshold * union)
    if method == "hard":
        return best, index, torch.where(overlaps, -math.inf, alive)
    iou = torch.where(union > 0, inter / union, 0.0)
    if method == "linear":
        alive = torch.where(overlaps, alive * (1 - iou), alive)
    else:
        alive = torch.where(rival, alive * torch.exp(-(iou**2) / sigma), alive)
    return best, index, torch.where(alive > min_score, alive, -math.inf)


def nms_result(
    boxes: Tensor, classes: Tensor, best: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns boxes, scores, classes and counts of slots [B, D]; -inf marks an empty one."""
    valid = best > -math.inf
    box = boxes.gather(1, index[..., None].expand(-1, -1, 4)).float()
    return (
        torch.where(valid[..., None], box, 0.0),
        torch.where(valid, best, 0.0),
        torch.where(valid, classes.gather(1, index), -1),
        valid.sum(dim=1).int(),
    )


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See ``fcos_d2.ops.batched_nms``."""
    order = torch.sort(scores, descending=True, stable=True).indices
    boxes, idxs = boxes[order].float(), idxs[order]
    alive = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if alive[i]:
            rest = slice(i + 1, None)
            inter, union = _overlap(boxes[i], boxes[rest])
            alive[rest] &= ~((idxs[rest] == idxs[i]) & (inter > iou_threshold * union))
    return order[alive]


def _overlap(box: Tensor, boxes: Tensor, pixel_extent: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the areas of intersection and union; with NaN coordinates NaN, hence no overlap."""
    top_left = torch.maximum(box[..., :2], boxes[..., :2])
    bottom_right = torch.minimum(box[..., 2:], boxes[..., 2:]) + pixel_extent
    width, height = (bottom_right - top_left).clamp(min=0).unbind(dim=-1)
    inter = width * height
    return inter, area(box, pixel_extent) + area(boxes, pixel_extent) - inter
