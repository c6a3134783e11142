"""Compares sigmoid_focal_loss, forward and backward, with fvcore, torchvision and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import one_hot

from fcos_d2.ops import assign_targets, sigmoid_focal_loss

from .measure import Row, compare
from .peers import needs
from .workload import CLASSES, LEVELS, RANGES, make_batch, name_of, size_in_bytes


def run(images: int, device: torch.device) -> list[Row]:
    """Returns rows for loss and gradient from NCHW levels, in float32 and bfloat16."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        batch = make_batch(images, 100, device, dtype)
        truth = (batch.boxes, batch.classes, batch.offsets)
        labels = assign_targets(*truth, LEVELS, RANGES, num_classes=CLASSES).labels
        wide = labels.long()

        def step(loss, labels, logits=batch.logits):
            return lambda: torch.autograd.grad(loss(logits, labels), logits)

        saved = partial(sigmoid_focal_loss, scale=torch.ones((), device=device), save_gradient=True)
        last = [x.detach().contiguous(memory_format=torch.channels_last) for x in batch.logits]
        contenders = {
            "ours": step(saved, labels),
            "ours, gradient recomputed": step(sigmoid_focal_loss, labels),
            "ours, channels_last": step(saved, labels, [x.requires_grad_() for x in last]),
            **{name: step(loss, wide) for name, loss in _peers(device).items()},
        }
        workload = f"{images} images, {name_of(dtype)}"
        floor = 2 * size_in_bytes(batch.logits) + size_in_bytes([labels])
        rows += compare("sigmoid_focal_loss", workload, contenders, device, floor)
        rows += compare(
            "sigmoid_focal_loss", f"{workload}, backward with the gradient saved",
            {"ours": _saved_backward(batch.logits, labels)}, device, 0,
        )  # fmt: skip
    return rows


def _saved_backward(logits, labels):
    """Returns the backward pass after ``save_gradient``, for an upstream gradient of 1."""
    one = torch.ones((), device=labels.device)
    gradient = [torch.empty_like(x) for x in logits]
    maps = [x.detach() for x in logits], [], []
    rule = 0.25, 2.0, "giou", "centerness", False, []
    arguments = (gradient, [one], *maps, [labels], [one], [1.0], [1.0], *rule, True)
    return lambda: torch.ops.fcos_d2.fcos_loss_gradient(*arguments)


def _peers(device):
    """Returns all installed peers, which share a formula, and the first of them compiled."""
    losses = {name: _dense(loss) for name, loss in {**_fvcore(), **_torchvision()}.items()}
    for name, loss in list(losses.items())[:1]:
        losses[f"torch.compile of {name}"] = torch.compile(loss)
        if device.type == "cuda":
            tuned = torch.compile(loss, mode="max-autotune-no-cudagraphs")
            losses["torch.compile, max-autotune"] = tuned
    return losses


def _dense(loss):
    """Calls ``loss`` as peers do, on concatenated levels and one-hot targets."""

    def run(logits, labels):
        flat = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in logits], dim=1)
        target = one_hot(labels, CLASSES + 1)[..., :CLASSES].to(flat.dtype)
        return loss(flat, target, alpha=0.25, gamma=2.0, reduction="sum")

    return run


@needs("fvcore")
def _fvcore():
    from fvcore.nn import sigmoid_focal_loss, sigmoid_focal_loss_jit

    return {"fvcore": sigmoid_focal_loss, "fvcore jit": sigmoid_focal_loss_jit}


@needs("torchvision")
def _torchvision():
    from torchvision.ops import sigmoid_focal_loss

    return {"torchvision": sigmoid_focal_loss}
