"""sigmoid_focal_loss (1708.02002 equation 5), with its gradient in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulate_dtype


def sigmoid_focal_loss(logits: list[Tensor], labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """See ``fcos_d2.ops.sigmoid_focal_loss``."""
    _check_labels(labels, logits[0].shape[1])
    total = logits[0].new_zeros((), dtype=accumulate_dtype(logits[0]))
    for level, label in zip(logits, _labels_like_maps(labels, logits), strict=True):
        z, _, weight = _focal_terms(level, label, alpha)
        total = total + (weight * torch.sigmoid(z).pow(gamma) * F.softplus(z)).sum()
    return total


def sigmoid_focal_loss_backward(
    grad: Tensor, logits: list[Tensor], labels: Tensor, alpha: float, gamma: float
) -> list[Tensor]:
    """Returns the gradients: ``d loss / dz = w p^gamma (gamma (1 - p) softplus(z) + p)``."""
    grads = []
    for level, label in zip(logits, _labels_like_maps(labels, logits), strict=True):
        z, sign, weight = _focal_terms(level, label, alpha)
        p = torch.sigmoid(z)
        slope = gamma * torch.sigmoid(-z) * F.softplus(z) + p
        slope = grad * sign * weight * p.pow(gamma) * slope
        grads.append(torch.empty_like(level).copy_(slope))  # in the memory layout of the level
    return grads


def _focal_terms(logits: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logit z of being wrong (-x for the true class, x for others), dz/dx and weight.

    In terms of z, positives and negatives share one formula, ``weight * sigmoid(z)^gamma *
    softplus(z)``.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    is_true_class, is_ignored = labels[:, None] == classes, labels[:, None] == -1
    sign = torch.where(is_true_class, -1.0, 1.0).to(accumulate_dtype(logits))
    weight = torch.ones_like(sign)
    if alpha >= 0:
        weight = torch.where(is_true_class, alpha, 1 - alpha).to(sign.dtype)
    # Masked, because zero times an ignored NaN logit would be NaN.
    return (sign * logits).masked_fill(is_ignored, 0), sign, weight.masked_fill(is_ignored, 0)


def _labels_like_maps(labels: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """[B, P] -> one [B, H, W] per level."""
    sizes = [level.shape[2:] for level in maps]
    parts = labels.split([height * width for height, width in sizes], dim=1)
    return [part.unflatten(1, tuple(size)) for part, size in zip(parts, sizes, strict=True)]


def _check_labels(labels: Tensor, num_classes: int) -> None:
    torch._assert_async(
        ((labels >= -1) & (labels <= num_classes)).all(),
        f"sigmoid_focal_loss: labels must lie in [-1, {num_classes}]: -1 is ignored, "
        f"{num_classes} is background",
    )
