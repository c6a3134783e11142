"""fcos_loss: ``sigmoid_focal_loss`` and ``box_loss`` in one pass, normalized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_flags, check_same_device
from ._losses import Losses
from .assign_targets import Targets
from .box_loss import box_loss, check_boxes
from .reference import accumulate_dtype
from .sigmoid_focal_loss import check_logits, sigmoid_focal_loss


def fcos_loss(
    logits: Sequence[Tensor],
    ltrb: Sequence[Tensor],
    quality: Sequence[Tensor],
    targets: Targets,
    normalizers: Sequence[tuple[Tensor, float]],
    *,
    cls_weight: float,
    alpha: float,
    gamma: float,
    save_gradient: bool,
    **box_rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the classification, box and quality losses, each divided by its normalizer.

    Args:
        logits: see ``sigmoid_focal_loss``.
        ltrb: see ``box_loss``.
        quality: see ``box_loss``.
        targets: the result of ``assign_targets`` for these levels.
        normalizers: for each loss, a scalar tensor on the device and its lower bound.
        cls_weight: weight of the classification loss.
        alpha: see ``sigmoid_focal_loss``.
        gamma: see ``sigmoid_focal_loss``.
        save_gradient: see ``sigmoid_focal_loss``; applies to all losses.
        box_rule: all options of ``box_loss``.

    Returns:
        float32 (float64 for float64 predictions) scalars, once differentiable in the predictions.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or value.
        NotImplementedError: the losses are differentiated twice.
    """
    check_logits("fcos_loss", logits, targets.labels, alpha, gamma)
    smoothing = check_boxes("fcos_loss", ltrb, quality, targets, **box_rule)
    check_same_device("fcos_loss", logits=logits[0], ltrb=ltrb[0])
    check_flags("fcos_loss", save_gradient=save_gradient)
    dtype, weights = accumulate_dtype(logits[0]), (cls_weight, 1.0, 1.0)
    if torch.compiler.is_compiling() or dtype != accumulate_dtype(ltrb[0]):
        cls = sigmoid_focal_loss(logits, targets.labels, alpha, gamma)
        losses = cls, *box_loss(ltrb, quality, targets, **box_rule)
        scales = (
            w / d.clamp(min=floor) for w, (d, floor) in zip(weights, normalizers, strict=True)
        )
        return tuple(loss * scale.to(loss) for loss, scale in zip(losses, scales, strict=True))
    divisors = [divisor.to(dtype) for divisor, _ in normalizers]
    floors = [float(floor) for _, floor in normalizers]
    rule = [box_rule[key] for key in ("loss_type", "quality_type", "weight_by_centerness")]
    options = [float(w) for w in weights], floors, float(alpha), float(gamma), *rule, smoothing
    box_targets = [targets.labels, targets.matched, targets.ltrb, targets.centerness]
    maps = *logits, *ltrb, *quality
    save_gradient &= torch.is_grad_enabled() and any(level.requires_grad for level in maps)
    return Losses.apply(len(logits), box_targets, divisors, options, save_gradient, *maps)
