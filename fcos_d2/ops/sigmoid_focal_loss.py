"""sigmoid_focal_loss: classification loss of dense detectors, from integer labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import check_flags, check_maps, check_number, check_same_device, check_tensor
from ._library import define_autograd, define_op, forbid_double_backward
from ._losses import Losses


def sigmoid_focal_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    scale: Tensor | None = None,
    save_gradient: bool = False,
) -> Tensor:
    """Computes the focal loss, summed over all points and classes (1708.02002 equation 5).

    No one-hot target is materialized: a point with label c is positive for class c and negative
    for the other K - 1, a background point is negative for all K, and an ignored point does not
    contribute, whatever its logits.

    Args:
        logits: one Tensor[B, K, H, W] per level, float32, float16, bfloat16 or float64, in any
            memory format; computed in float32 (float64 for float64).
        labels: int32 Tensor[B, P] in [0, K), K for background, -1 to ignore; P counts the points of
            all levels, level-major, row-major inside a level.
        alpha: weight of positives in [0, 1], 1 - alpha for negatives; -1 disables weighting.
        gamma: focusing exponent in [0, 1000].
        scale: float32 (float64 for float64 logits) scalar on the device of ``logits`` that the sum
            is multiplied by, such as weight / number of positives; no gradient flows into it.
        save_gradient: compute the gradient together with the loss, in one pass over the logits, and
            keep it for the backward pass, which then only checks that the upstream gradient is 1.
            If it is not (a gradient scaler, a loss that is divided later), the gradient is
            recomputed. Costs the memory of the gradient between the two passes. Ignored under
            torch.compile, which decides itself what to save.

    Returns:
        float32 (float64 for float64 logits) scalar, once differentiable in ``logits``; the loss and
        its gradient are finite for finite logits. CUDA kernels may return zero for a gradient below
        1.2e-38, the smallest normal float32 number.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or value.
        RuntimeError: a label is outside [-1, K] (checked on the device, asynchronously on GPUs).
        NotImplementedError: the loss is differentiated twice.

    Example:
        >>> logits = [torch.zeros(1, 2, 1, 1)]
        >>> sigmoid_focal_loss(logits, torch.tensor([[0]], dtype=torch.int32))
        tensor(0.1733)
    """
    name = "sigmoid_focal_loss"
    check_logits(name, logits, labels, alpha, gamma)
    check_flags(name, save_gradient=save_gradient)
    wanted = reference.accumulate_dtype(logits[0])
    if scale is not None:
        check_tensor(name, "scale", scale, [], [wanted], "make it with logits[0].new_tensor()")
        check_same_device(name, logits=logits[0], scale=scale)
        scale = scale.detach()
    alpha, gamma = float(alpha), float(gamma)
    wants_gradient = torch.is_grad_enabled() and any(level.requires_grad for level in logits)
    if save_gradient and wants_gradient and not torch.compiler.is_compiling():
        divisor = logits[0].new_ones((), dtype=wanted) if scale is None else scale.reciprocal()
        options = [1.0], [-math.inf], alpha, gamma, *_NO_BOXES
        (loss,) = Losses.apply(len(logits), [labels], [divisor], options, True, *logits)
        return loss
    loss = _op(list(logits), labels, alpha, gamma)
    return loss if scale is None else loss * scale


def check_logits(
    name: str, logits: Sequence[Tensor], labels: Tensor, alpha: float, gamma: float
) -> None:
    """Raises ValueError if an argument is invalid."""
    check_maps(name, "logits", logits, "K")
    points = sum(level.shape[2] * level.shape[3] for level in logits)
    shape = [logits[0].shape[0], points]
    check_tensor(name, "labels", labels, shape, [torch.int32], "cast with .int()")
    check_same_device(name, logits=logits[0], labels=labels)
    if alpha != -1:
        check_number(name, "alpha (or -1 for no weights)", alpha, 0, 1)
    check_number(name, "gamma", gamma, 0, 1000)


_NO_BOXES = "giou", "centerness", False, []  # options of fcos_loss, unused without boxes


def _fake(logits, labels, alpha, gamma):
    return logits[0].new_empty((), dtype=reference.accumulate_dtype(logits[0]))


def _fake_backward(grad, logits, labels, alpha, gamma):
    return [torch.empty_like(level) for level in logits]


def _setup_context(ctx, inputs, output):
    logits, labels, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(labels, *logits)


def _backward(ctx, grad):
    labels, *logits = ctx.saved_tensors
    return _op_backward(grad, logits, labels, ctx.alpha, ctx.gamma), None, None, None


_op = define_op(
    "sigmoid_focal_loss(Tensor[] logits, Tensor labels, float alpha, float gamma) -> Tensor",
    reference.sigmoid_focal_loss,
    _fake,
)
_op_backward = define_op(
    "sigmoid_focal_loss_backward(Tensor grad, Tensor[] logits, Tensor labels, float alpha, "
    "float gamma) -> Tensor[]",
    reference.sigmoid_focal_loss_backward,
    _fake_backward,
)
define_autograd("sigmoid_focal_loss", _backward, _setup_context)
forbid_double_backward("sigmoid_focal_loss_backward")
