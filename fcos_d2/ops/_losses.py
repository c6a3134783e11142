"""The ops behind ``fcos_loss`` and ``save_gradient``: all losses in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._library import define_op, without_second_derivative


class Losses(torch.autograd.Function):
    """Classification, box and quality losses, or the classification loss alone.

    Each is ``weight / max(divisor, floor)`` times the sum that its own op returns. With
    ``save_gradient``, the forward pass also computes the gradient; the backward pass then only
    checks that all upstream gradients are 1, and recomputes the gradient if they are not.
    """

    @staticmethod
    def forward(ctx, num_levels, targets, divisors, options, save_gradient, *maps):
        """Returns one or three losses; ``options`` are the op's arguments from ``weights`` on."""
        ctx.num_levels, ctx.num_targets, ctx.options = num_levels, len(targets), options
        ctx.save_for_backward(*maps, *targets, *divisors)
        losses, gradient = _op(*_inputs(ctx, (*maps, *targets, *divisors)), save_gradient)
        ctx.gradient = gradient if save_gradient else None
        return tuple(losses)

    @staticmethod
    def backward(ctx, *upstream):
        """Returns the gradients of ``maps``."""
        tensors = ctx.saved_tensors
        maps = tensors[: -ctx.num_targets - len(upstream)]
        # Autograd may modify it in place, so a second backward pass has to recompute it.
        gradient, ctx.gradient = ctx.gradient, None
        is_saved = gradient is not None
        with torch.no_grad():
            gradient = gradient if is_saved else [torch.empty_like(level) for level in maps]
            _op_gradient(gradient, list(upstream), *_inputs(ctx, tensors), is_saved)
        if torch.is_grad_enabled():  # under create_graph
            gradient = without_second_derivative("fcos_loss_gradient", gradient, (*upstream, *maps))
        return None, None, None, None, None, *gradient


def _inputs(ctx, tensors: tuple[Tensor, ...]) -> tuple:
    """Returns the arguments that both ops share."""
    n, divisors = ctx.num_levels, len(ctx.options[0])
    maps, rest = tensors[: -ctx.num_targets - divisors], tensors[-ctx.num_targets - divisors :]
    maps = list(maps[:n]), list(maps[n : 2 * n]), list(maps[2 * n :])
    return *maps, list(rest[: ctx.num_targets]), list(rest[ctx.num_targets :]), *ctx.options


def _fake(logits, ltrb, quality, targets, divisors, weights, *options):
    dtype = reference.accumulate_dtype(logits[0])
    losses = [logits[0].new_empty((), dtype=dtype) for _ in weights]
    with_gradient = options[-1]
    maps = (*logits, *ltrb, *quality) if with_gradient else ()
    return losses, [torch.empty_like(level) for level in maps]


def _fake_gradient(gradient, upstream, *inputs):
    return None


_INPUTS = (
    "Tensor[] logits, Tensor[] ltrb, Tensor[] quality, Tensor[] targets, Tensor[] divisors, "
    "float[] weights, float[] floors, float alpha, float gamma, str loss_type, str quality_type, "
    "bool weight_by_centerness, float[] smoothing"
)
_op = define_op(
    f"fcos_loss({_INPUTS}, bool with_gradient) -> (Tensor[], Tensor[])", reference.fcos_loss, _fake
)
_op_gradient = define_op(
    f"fcos_loss_gradient(Tensor(a!)[] gradient, Tensor[] upstream, {_INPUTS}, bool is_saved) -> ()",
    reference.fcos_loss_gradient,
    _fake_gradient,
)
