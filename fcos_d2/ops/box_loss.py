"""box_loss: IoU-based regression loss and box-quality loss of the positive points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check,
    check_choice,
    check_flags,
    check_maps,
    check_same_device,
    check_tensor,
    is_number,
)
from ._library import define_autograd, define_op, forbid_double_backward
from .assign_targets import Targets

LOSS_TYPES = ("iou", "linear_iou", "giou", "diou", "ciou")
QUALITY_TYPES = ("centerness", "iou")


def box_loss(
    ltrb: Sequence[Tensor],
    quality: Sequence[Tensor],
    targets: Targets,
    *,
    loss_type: str = "giou",
    quality_type: str = "centerness",
    weight_by_centerness: bool = True,
    smoothing: Sequence[float] | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Computes the box loss and the box-quality loss, each summed over the positive points.

    The predicted and the true box of a point contain it, so the distances determine their IoU
    (1904.01355 section 3.1). The quality loss is the binary cross-entropy between the predicted
    quality and the centerness of the point (equation 3) or the IoU of its prediction, which is
    treated as a constant (2006.09214 section 3).

    Args:
        ltrb: one Tensor[B, 4, H, W] per level, predicted distances in strides, >= 0; float32,
            float16, bfloat16 or float64, in any memory format; computed in float32 (float64 for
            float64).
        quality: one Tensor[B, 1, H, W] of logits per level.
        targets: the result of ``assign_targets`` for these levels.
        loss_type: "iou" (-log IoU), "linear_iou" (1 - IoU), "giou" (1902.09630), "diou" or "ciou"
            (1911.08287).
        quality_type: "centerness" or "iou".
        weight_by_centerness: multiply each point's box loss by its centerness.
        smoothing: added to intersection and union, in squared strides, one number or one per level:
            the original uses 1, which softens the loss of small objects; 0 is the plain IoU.

    Returns:
        Box loss and quality loss, float32 (float64 for float64 predictions) scalars, once
        differentiable in ``ltrb`` and ``quality``; zero if there are no positive points.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or value.
        NotImplementedError: the losses are differentiated twice.

    Example:
        >>> one = torch.ones(1, 4, 1, 1)
        >>> targets = Targets(None, torch.zeros(1, 1).int(), one.view(1, 1, 4), one[0, 0], None)
        >>> box, quality = box_loss([one], [torch.zeros(1, 1, 1, 1)], targets)
        >>> round(quality.item(), 4)
        0.6931
    """
    options = loss_type, quality_type, weight_by_centerness
    smoothing = check_boxes("box_loss", ltrb, quality, targets, *options, smoothing)
    return _op(
        list(ltrb), list(quality), targets.matched, targets.ltrb, targets.centerness,
        *options, smoothing,
    )  # fmt: skip


def check_boxes(
    name: str,
    ltrb: Sequence[Tensor],
    quality: Sequence[Tensor],
    targets: Targets,
    loss_type: str,
    quality_type: str,
    weight_by_centerness: bool,
    smoothing: Sequence[float] | float,
) -> list[float]:
    """Raises ValueError if an argument is invalid.

    Returns:
        The smoothing of each level.
    """
    check_maps(name, "ltrb", ltrb, 4)
    check_maps(name, "quality", quality, 1, like=ltrb)
    check(
        quality[0].dtype == ltrb[0].dtype, name, "quality must have the dtype of ltrb", quality[0]
    )
    shape = [ltrb[0].shape[0], sum(level.shape[2] * level.shape[3] for level in ltrb)]
    check(isinstance(targets, Targets), name, "targets must be fcos_d2.ops.Targets", targets)
    _, matched, target_ltrb, centerness, *_ = targets
    check_tensor(name, "targets.matched", matched, shape, [torch.int32], "cast with .int()")
    check_tensor(name, "targets.ltrb", target_ltrb, [*shape, 4], [torch.float32])
    check_tensor(name, "targets.centerness", centerness, shape, [torch.float32])
    check_same_device(
        name, ltrb=ltrb[0], matched=matched, target_ltrb=target_ltrb, centerness=centerness
    )
    check_choice(name, "loss_type", loss_type, LOSS_TYPES)
    check_choice(name, "quality_type", quality_type, QUALITY_TYPES)
    check_flags(name, weight_by_centerness=weight_by_centerness)
    if isinstance(smoothing, (int, float)):
        smoothing = [smoothing] * len(ltrb)
    check(
        isinstance(smoothing, Sequence)
        and len(smoothing) == len(ltrb)
        and all(is_number(s, 0, math.inf) for s in smoothing),
        name,
        f"smoothing must be one number >= 0, or {len(ltrb)} of them, one per level",
        smoothing,
    )
    return [float(s) for s in smoothing]


def _fake(ltrb, *_):
    dtype = reference.accumulate_dtype(ltrb[0])
    return ltrb[0].new_empty((), dtype=dtype), ltrb[0].new_empty((), dtype=dtype)


def _fake_backward(grad_box, grad_quality, ltrb, quality, *_):
    return [torch.empty_like(t) for t in ltrb], [torch.empty_like(t) for t in quality]


def _setup_context(ctx, inputs, output):
    ltrb, quality, *targets = inputs[:5]
    ctx.num_levels, ctx.options = len(ltrb), inputs[5:]
    ctx.save_for_backward(*ltrb, *quality, *targets)


def _backward(ctx, grad_box, grad_quality):
    n = ctx.num_levels
    ltrb, quality = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n]
    grads = _op_backward(
        grad_box, grad_quality, list(ltrb), list(quality), *ctx.saved_tensors[2 * n :], *ctx.options
    )
    return (*grads, *[None] * 7)


_INPUTS = (
    "Tensor[] ltrb, Tensor[] quality, Tensor matched, Tensor target_ltrb, "
    "Tensor target_centerness, str loss_type, str quality_type, bool weight_by_centerness, "
    "float[] smoothing"
)
_op = define_op(f"box_loss({_INPUTS}) -> (Tensor, Tensor)", reference.box_loss, _fake)
_op_backward = define_op(
    f"box_loss_backward(Tensor grad_box, Tensor grad_quality, {_INPUTS}) -> (Tensor[], Tensor[])",
    reference.box_loss_backward,
    _fake_backward,
)
define_autograd("box_loss", _backward, _setup_context)
forbid_double_backward("box_loss_backward")
