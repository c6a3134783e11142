"""box_loss (1904.01355 equation 2; 1608.01471, 1902.09630, 1911.08287), with its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulate_dtype, maps_to_points

EPS = 1e-7  # keeps denominators of the IoU family away from zero
MIN_IOU = 1e-6  # unsmoothed -log(IoU) is constant below: disjoint boxes have a finite loss


def box_loss(*inputs, **options) -> tuple[Tensor, Tensor]:
    """See ``fcos_d2.ops.box_loss``; the arguments are those of ``_terms_of_points``."""
    terms = _terms_of_points(*inputs, **options)
    quality = F.binary_cross_entropy_with_logits(terms.logit, terms.quality, reduction="none")
    return (
        torch.where(terms.positive, terms.weight * terms.loss, 0.0).sum(),
        torch.where(terms.positive, quality, 0.0).sum(),
    )


def box_loss_backward(
    grad_box: Tensor,
    grad_quality: Tensor,
    ltrb: list[Tensor],
    quality: list[Tensor],
    *targets,
    **options,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the gradients of ``box_loss``; zero except at positive points."""
    terms = _terms_of_points(ltrb, quality, *targets, **options)
    slope = grad_box * terms.weight[..., None] * terms.slope
    slope = torch.where(terms.positive[..., None], slope, 0.0)
    quality_slope = grad_quality * (torch.sigmoid(terms.logit) - terms.quality)
    quality_slope = torch.where(terms.positive, quality_slope, 0.0)
    return _points_to_maps(slope, ltrb), _points_to_maps(quality_slope[..., None], quality)


class _Terms(NamedTuple):
    """The terms of box_loss and its gradient for all B x P points, positive or not."""

    positive: Tensor  # [B, P]
    weight: Tensor  # [B, P], of the box loss
    loss: Tensor  # [B, P]
    slope: Tensor  # [B, P, 4], d loss / d ltrb
    logit: Tensor  # [B, P], of the quality
    quality: Tensor  # [B, P], target of the quality


def _terms_of_points(
    ltrb: list[Tensor],
    quality: list[Tensor],
    matched: Tensor,
    target_ltrb: Tensor,
    target_centerness: Tensor,
    loss_type: str,
    quality_type: str,
    weight_by_centerness: bool,
    smoothing: list[float],
) -> _Terms:
    dtype = accumulate_dtype(ltrb[0])
    pred, logit = maps_to_points(ltrb).to(dtype), maps_to_points(quality).to(dtype)[..., 0]
    positive = matched >= 0
    # Other points get an arbitrary target that keeps their values, which are masked later, finite.
    target = torch.where(positive[..., None], target_ltrb.to(dtype), pred.abs() + 1)
    smooth = [level.shape[2] * level.shape[3] for level in ltrb]
    smooth = torch.cat([pred.new_full((n,), s) for n, s in zip(smooth, smoothing, strict=True)])
    loss, iou, slope = iou_loss(pred, target, loss_type, smooth)
    weight = target_centerness.to(dtype) if weight_by_centerness else torch.ones_like(loss)
    wanted = target_centerness.to(dtype) if quality_type == "centerness" else iou
    return _Terms(positive, weight, loss, slope, logit, wanted)


def iou_loss(
    pred: Tensor, target: Tensor, loss_type: str, smoothing: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the IoU of two boxes that share a reference point, a loss on it and its gradient.

    Args:
        pred: Tensor[..., 4], ltrb of the predicted box.
        target: Tensor[..., 4], ltrb of the true box, all positive.
        loss_type: "iou" (-log IoU), "linear_iou" (1 - IoU), "giou", "diou" or "ciou".
        smoothing: added to intersection and union, in squared units of ltrb (the authors use 1).
            If it is 0, "iou" is flat below an IoU of 1e-6.

    Returns:
        loss Tensor[...], IoU Tensor[...], d loss / d pred Tensor[..., 4].
    """
    overlap = _overlap(pred, target)
    denominator = overlap.union + smoothing + EPS
    iou = (overlap.inter + smoothing) / denominator
    d_iou = (overlap.d_inter - iou[..., None] * overlap.d_union) / denominator[..., None]
    if loss_type == "iou":
        flat = iou <= MIN_IOU * (smoothing == 0)  # with smoothing, only for inverted boxes
        loss = ((overlap.different + EPS) / (overlap.inter + smoothing)).log1p()  # -log(iou)
        loss = torch.where(flat, -math.log(MIN_IOU), loss)
        return loss, iou, torch.where(flat[..., None], 0.0, -d_iou / iou[..., None])
    loss, slope = (overlap.different + EPS) / denominator, -d_iou  # 1 - iou
    if loss_type == "giou":
        empty, d_empty = _empty_share(pred, target, overlap)
        return loss + empty, iou, slope + d_empty
    if loss_type in ("diou", "ciou"):
        distance, d_distance = _center_distance(pred, target)
        aspect, d_aspect = _aspect_ratio(pred, target, loss) if loss_type == "ciou" else (0.0, 0.0)
        return loss + distance + aspect, iou, slope + d_distance + d_aspect
    return loss, iou, slope


class _Overlap(NamedTuple):
    """Areas [...] of two boxes and their derivatives [..., 4] w.r.t. the predicted one."""

    inter: Tensor
    union: Tensor
    different: Tensor  # area in only one box: union - inter
    corners: Tensor  # area of the enclosing box that neither box covers
    overlaps: Tensor
    d_inter: Tensor
    d_union: Tensor


def _overlap(pred: Tensor, target: Tensor) -> _Overlap:
    width, d_width = _extent(pred[..., 0::2], target[..., 0::2], torch.minimum)
    height, d_height = _extent(pred[..., 1::2], target[..., 1::2], torch.minimum)
    overlaps = (width > 0) & (height > 0)
    inter = torch.where(overlaps, width * height, 0.0)
    d_inter = _interleave(d_width * height[..., None], d_height * width[..., None])
    d_inter = torch.where(overlaps[..., None], d_inter, 0.0)
    (pred_w, pred_h), (target_w, target_h) = _size(pred), _size(target)
    # The symmetric difference is computed from the extents beyond the overlap: subtracting areas
    # would cancel catastrophically for boxes that nearly coincide.
    more_w, more_h = _size((pred - target).clamp(min=0))
    less_w, less_h = _size((target - pred).clamp(min=0))
    different = width * (more_h + less_h) + height * (more_w + less_w)
    different = different + more_w * more_h + less_w * less_h
    different = torch.where(overlaps, different, pred_w * pred_h + target_w * target_h)
    d_union = torch.stack((pred_h, pred_w, pred_h, pred_w), dim=-1) - d_inter
    corners = more_w * less_h + less_w * more_h
    return _Overlap(inter, inter + different, different, corners, overlaps, d_inter, d_union)


def _empty_share(pred: Tensor, target: Tensor, overlap: _Overlap) -> tuple[Tensor, Tensor]:
    """Returns the fraction of the enclosing box covered by neither box, and its derivative."""
    width, d_width = _extent(pred[..., 0::2], target[..., 0::2], torch.maximum)
    height, d_height = _extent(pred[..., 1::2], target[..., 1::2], torch.maximum)
    cover = width * height
    d_cover = _interleave(d_width * height[..., None], d_height * width[..., None])
    empty = torch.where(overlap.overlaps, overlap.corners, cover - overlap.union) / (cover + EPS)
    slope = d_cover - overlap.d_union - empty[..., None] * d_cover
    return empty, slope / (cover + EPS)[..., None]


def _center_distance(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns squared center distance over squared diagonal (1911.08287), and its derivative."""
    width, d_width = _extent(pred[..., 0::2], target[..., 0::2], torch.maximum)
    height, d_height = _extent(pred[..., 1::2], target[..., 1::2], torch.maximum)
    diagonal = width**2 + height**2 + EPS
    d_diagonal = _interleave(2 * width[..., None] * d_width, 2 * height[..., None] * d_height)
    difference = pred - target
    shift = (difference[..., 2:] - difference[..., :2]) / 2  # between the centers, (x, y)
    distance = (shift**2).sum(dim=-1) / diagonal
    slope = torch.cat((-shift, shift), dim=-1) - distance[..., None] * d_diagonal
    return distance, slope / diagonal[..., None]


def _aspect_ratio(pred: Tensor, target: Tensor, distinct: Tensor) -> tuple[Tensor, Tensor]:
    """Returns CIoU's aspect-ratio term (1911.08287; constant weight), and its derivative."""
    (pred_w, pred_h), (target_w, target_h) = _size(pred), _size(target)
    angle = torch.atan2(pred_w, pred_h) - torch.atan2(target_w, target_h)
    aspect = 4 / math.pi**2 * angle**2
    trade_off = aspect / (distinct + aspect + EPS)
    d_angle = torch.stack((pred_h, -pred_w, pred_h, -pred_w), dim=-1)
    d_angle = d_angle / (pred_w**2 + pred_h**2 + EPS)[..., None]
    slope = 8 / math.pi**2 * angle[..., None] * d_angle
    return trade_off * aspect, trade_off[..., None] * slope


def _size(ltrb: Tensor) -> tuple[Tensor, Tensor]:
    """Returns width and height."""
    return (ltrb[..., :2] + ltrb[..., 2:]).unbind(dim=-1)


def _extent(pred: Tensor, target: Tensor, bound) -> tuple[Tensor, Tensor]:
    """Returns the length of the intersection (bound = minimum) or hull (maximum) of two intervals.

    Both intervals contain a common point and are given as distances [..., 2] from it to their ends.
    Also returns the derivative [..., 2], d length / d pred.
    """
    ends = bound(pred, target)
    return ends.sum(dim=-1), ((ends == pred) & (pred != target)).to(pred.dtype)


def _interleave(horizontal: Tensor, vertical: Tensor) -> Tensor:
    """(left, right) and (top, bottom) -> (left, top, right, bottom)."""
    return torch.stack((horizontal, vertical), dim=-1).flatten(-2)


def _points_to_maps(points: Tensor, like: list[Tensor]) -> list[Tensor]:
    """[B, P, C] -> one [B, C, H, W] per level, in the dtype and memory layout of ``like``."""
    parts = points.split([level.shape[2] * level.shape[3] for level in like], dim=1)
    return [
        torch.empty_like(level).copy_(part.transpose(1, 2).reshape(level.shape))
        for part, level in zip(parts, like, strict=True)
    ]
