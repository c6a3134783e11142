"""fcos_loss: all losses of FCOS (1904.01355 equation 2), each with its own scale."""

from __future__ import annotations

from torch import Tensor

from .box_loss import box_loss, box_loss_backward
from .sigmoid_focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_backward


def fcos_loss(
    logits: list[Tensor],
    ltrb: list[Tensor],
    quality: list[Tensor],
    targets: list[Tensor],
    divisors: list[Tensor],
    weights: list[float],
    floors: list[float],
    alpha: float,
    gamma: float,
    *box_options,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the losses and, if the last argument is True, the gradients of their sum.

    ``targets`` are labels and, if there are boxes, matched, ltrb and centerness. The losses are
    ``weight / max(divisor, floor)`` times the classification loss and, if there are boxes, the box
    and quality losses of the other ops.
    """
    *box_options, with_gradient = box_options
    labels, *box_targets = targets
    losses = [sigmoid_focal_loss(logits, labels, alpha, gamma)]
    if ltrb:
        losses += box_loss(ltrb, quality, *box_targets, *box_options)
    scales = _scales(divisors, weights, floors)
    losses = [loss * scale for loss, scale in zip(losses, scales, strict=True)]
    if not with_gradient:
        return losses, []
    maps = logits, ltrb, quality
    return losses, _gradients(scales, *maps, targets, alpha, gamma, *box_options)


def fcos_loss_gradient(
    gradient: list[Tensor],
    upstream: list[Tensor],
    logits: list[Tensor],
    ltrb: list[Tensor],
    quality: list[Tensor],
    targets: list[Tensor],
    divisors: list[Tensor],
    weights: list[float],
    floors: list[float],
    *options,
) -> None:
    """Writes the gradients of the sum of the losses, weighted by ``upstream``, to ``gradient``.

    The last argument says that ``gradient`` already holds those of the unweighted sum, which
    kernels keep if all ``upstream`` are 1. Scaling them would round half precision twice.
    """
    scales = _scales(divisors, weights, floors)
    scales = [scale * grad for scale, grad in zip(scales, upstream, strict=True)]
    exact = _gradients(scales, logits, ltrb, quality, targets, *options[:-1])
    for level, values in zip(gradient, exact, strict=True):
        level.copy_(values)


def _scales(divisors: list[Tensor], weights: list[float], floors: list[float]) -> list[Tensor]:
    return [
        weight / divisor.clamp(min=floor)
        for divisor, weight, floor in zip(divisors, weights, floors, strict=True)
    ]


def _gradients(scales, logits, ltrb, quality, targets, alpha, gamma, *box_options) -> list[Tensor]:
    labels, *box_targets = targets
    gradients = sigmoid_focal_loss_backward(scales[0], logits, labels, alpha, gamma)
    if ltrb:
        boxes = box_loss_backward(*scales[1:], ltrb, quality, *box_targets, *box_options)
        gradients = [*gradients, *boxes[0], *boxes[1]]
    return gradients
