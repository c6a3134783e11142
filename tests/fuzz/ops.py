"""Fuzz target: calls of the ops with all kinds of invalid arguments.

Some arguments of a small valid call are changed: other dtypes, devices, ranks, sizes and strides,
numbers out of range, lists of wrong lengths, objects that are not tensors. The outcome must be a
result of the documented shapes, dtypes and ranges, or an error that names the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fcos_d2.ops import (
    Targets,
    assign_targets,
    batched_nms,
    batched_nms_padded,
    box_loss,
    make_levels,
    select_candidates,
    sigmoid_focal_loss,
)

from .choices import HOSTILE, Choices

ERRORS = (ValueError, RuntimeError)  # documented; NotImplementedError is a RuntimeError
STRIDES = (8, 16, 32)
NUMBERS = (0.0, 1.0, -1.0, 0.5, 88.0, -88.0, 1e4, 3e38, -3e38, 1e-38, math.nan, math.inf, -math.inf)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ODD_DTYPES = (
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.int8, *DTYPES),
    *(torch.float8_e4m3fn, torch.uint32),
)
SIZES = ((2, 3), (1, 1), (4, 4), (0, 2), (5, 1), (3, 16))

TENSOR_MUTATIONS: tuple[Callable[[Tensor, Choices], object], ...] = (
    lambda x, choices: x.clone().fill_(choices.of(NUMBERS)) if x.is_floating_point() else x,
    lambda x, choices: x.to(choices.of(ODD_DTYPES)),
    lambda x, choices: x.to("meta"),
    lambda x, choices: x.unsqueeze(choices.number(x.dim() + 1)),
    lambda x, choices: x.flatten(),
    lambda x, choices: x.transpose(0, -1) if x.dim() else x,
    lambda x, choices: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    lambda x, choices: x[..., :-1] if x.dim() else x,
    lambda x, choices: x[:0] if x.dim() else x,
    lambda x, choices: torch.cat((x, x)) if x.dim() else x,
    lambda x, choices: torch.cat((x, x), -1)[..., ::2] if x.dim() else x,
    lambda x, choices: x.flatten()[:1].squeeze().expand(x.shape) if x.numel() else x,
    lambda x, choices: x.flatten()[:1].squeeze().expand(2**40, *x.shape) if x.numel() else x,
    lambda x, choices: x.float().requires_grad_(),
    lambda x, choices: nn.Parameter(x, requires_grad=x.is_floating_point()),
    lambda x, choices: x.to_sparse(),
    lambda x, choices: x - choices.of((1, 100, 2**31)) if not x.is_floating_point() else -x,
    lambda x, choices: x + choices.of((1, 100, 2**31)) if not x.is_floating_point() else x * 1e30,
    lambda x, choices: x.numpy(),
    lambda x, choices: x.tolist(),
    lambda x, choices: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    lambda x, choices: torch.nested.nested_tensor([x, x]),
    lambda x, choices: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x, choices: x.to(torch.complex64).conj() if x.is_floating_point() else x,
)


def random(choices: Choices, *shape: int) -> Tensor:
    """Returns random numbers, some of them extreme."""
    g = torch.Generator().manual_seed(choices.number(256))
    x = torch.randn(shape, generator=g) * 3
    return torch.where(x > choices.of((9.0, 5.0, 0.0)), choices.of(NUMBERS), x)


def boxes(choices: Choices, *shape: int) -> Tensor:
    """Returns xyxy boxes of whole numbers, some of them extreme."""
    start = random(choices, *shape, 2).round() * 8
    return torch.cat((start, start + random(choices, *shape, 2).abs() * 16), -1)


def maps(choices: Choices, sizes: list, images: int, channels: int) -> list[Tensor]:
    """Returns a [B, C, H, W] for each size."""
    return [random(choices, images, channels, *size) for size in sizes]


def integers(choices: Choices, low: int, high: int, *shape: int) -> Tensor:
    """Returns int64 in [low, high)."""
    g = torch.Generator().manual_seed(choices.number(256))
    return torch.randint(low, high, shape, generator=g)


# ---- Valid arguments ----


class Scene:
    """Sizes that the arguments of a call share."""

    def __init__(self, choices: Choices):
        self.images, self.classes = choices.of((1, 2, 0, 3)), choices.of((2, 1, 5, 17))
        self.sizes = [choices.of(SIZES) for _ in range(choices.of((1, 2, 3)))]
        self.points = sum(height * width for height, width in self.sizes)
        self.levels = make_levels(self.sizes, STRIDES[: len(self.sizes)])
        self.dtype = choices.of(DTYPES)

    def maps(self, choices: Choices, channels: int) -> list[Tensor]:
        return [x.to(self.dtype) for x in maps(choices, self.sizes, self.images, channels)]


def assign_call(scene: Scene, choices: Choices) -> dict:
    counts = [choices.number(4) for _ in range(scene.images)]
    total = sum(counts)
    bounds = (-1, 16, 32, math.inf)
    return {
        "gt_boxes": boxes(choices, total),
        "gt_classes": integers(choices, -1, scene.classes, total),
        "gt_offsets": torch.tensor([0, *counts]).cumsum(0),
        "levels": scene.levels,
        "size_ranges": list(pairwise(bounds))[: len(scene.sizes)],
        "num_classes": scene.classes,
        "center_radius": choices.of((1.5, 0.0)),
        "inclusive": choices.of((True, False)),
        "pixel_extent": choices.of((0, 1)),
    }


def focal_call(scene: Scene, choices: Choices) -> dict:
    logits = [
        x.requires_grad_(choices.of((True, False))) for x in scene.maps(choices, scene.classes)
    ]
    labels = integers(choices, -1, scene.classes + 1, scene.images, scene.points).int()
    wide = torch.float64 if scene.dtype == torch.float64 else torch.float32
    return {
        "logits": logits,
        "labels": labels,
        "alpha": choices.of((0.25, -1.0)),
        "gamma": choices.of((2.0, 0.0, 1.5)),
        "scale": choices.of((None, torch.tensor(0.5, dtype=wide))),
        "save_gradient": choices.of((False, True)),
    }


def box_call(scene: Scene, choices: Choices) -> dict:
    shape = (scene.images, scene.points)
    matched = integers(choices, -1, 3, *shape).int()
    sides = random(choices, *shape, 4).abs() + 0.1
    targets = Targets(None, matched, sides, random(choices, *shape).abs().clamp(max=1), None)
    return {
        "ltrb": [x.abs().requires_grad_() for x in scene.maps(choices, 4)],
        "quality": [x.requires_grad_() for x in scene.maps(choices, 1)],
        "targets": targets,
        "loss_type": choices.of(("giou", "iou", "linear_iou", "diou", "ciou")),
        "quality_type": choices.of(("centerness", "iou")),
        "weight_by_centerness": choices.of((True, False)),
        "smoothing": choices.of((0.0, 1.0, [1.0] * len(scene.sizes))),
    }


def select_call(scene: Scene, choices: Choices) -> dict:
    return {
        "logits": scene.maps(choices, scene.classes),
        "ltrb": scene.maps(choices, 4),
        "quality": scene.maps(choices, 1),
        "levels": scene.levels,
        "image_sizes": integers(choices, 1, 100, scene.images, 2),
        "score_threshold": choices.of((0.05, 0.0, 1.0)),
        "topk": choices.of((3, 1, 1000)),
        "threshold_with_quality": choices.of((False, True)),
        "rank_with_quality": choices.of((True, False)),
        "score_rule": choices.of(("sqrt", "product", "cls")),
        "clip": choices.of((False, True)),
        "pixel_extent": choices.of((0, 1)),
        "drop_empty": choices.of((False, True)),
    }


def nms_call(scene: Scene, choices: Choices) -> dict:
    count = choices.number(20)
    return {
        "boxes": boxes(choices, count).to(scene.dtype),
        "scores": random(choices, count),
        "idxs": integers(choices, -1, scene.classes, count),
        "iou_threshold": choices.of((0.5, 0.0, 1.0)),
    }


def padded_call(scene: Scene, choices: Choices) -> dict:
    count = choices.number(20)
    return {
        "boxes": boxes(choices, scene.images, count),
        "scores": random(choices, scene.images, count),
        "classes": integers(choices, -1, scene.classes, scene.images, count),
        "iou_threshold": choices.of((0.5, 0.0, 1.0)),
        "max_detections": choices.of((3, 1, 100)),
        "class_agnostic": choices.of((False, True)),
        "method": choices.of(("hard", "linear", "gaussian")),
        "sigma": choices.of((0.5, 1e-6)),
        "min_score": choices.of((0.001, 0.0, 1.0)),
        "pixel_extent": choices.of((0, 1)),
    }


# ---- Valid results ----


def check_targets(out: Targets, call: dict) -> None:
    images, points = len(call["gt_offsets"]) - 1, call["levels"].num_points
    assert out.labels.shape == out.matched.shape == out.centerness.shape == (images, points)
    assert out.ltrb.shape == (images, points, 4)
    assert out.counts.shape == (images, len(call["levels"].shapes), 2)
    assert out.labels.dtype == out.matched.dtype == out.counts.dtype == torch.int32
    if out.labels.is_meta:
        return
    assert ((out.labels >= -1) & (out.labels <= call["num_classes"])).all()
    assert ((out.matched >= -1) & (out.matched < len(call["gt_boxes"]))).all()
    assert out.ltrb.isfinite().all() and ((out.centerness >= 0) & (out.centerness <= 1)).all()


def check_losses(out: Tensor | tuple[Tensor, ...], call: dict) -> None:
    losses = out if isinstance(out, tuple) else (out,)
    leaves = [*call.get("logits", ()), *call.get("ltrb", ()), *call.get("quality", ())]
    wide = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
    for loss in losses:
        assert loss.shape == () and loss.dtype == wide
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return
    grads = torch.autograd.grad(sum(losses), wanted, allow_unused=True)
    for x, grad in zip(wanted, grads, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype
    given = [*leaves, *(x for x in (call.get("scale"),) if x is not None)]
    if "logits" in call and not any(x.is_meta or not x.isfinite().all() for x in given):
        is_zero = call.get("scale") is not None and call["scale"] == 0  # 0 * inf is NaN
        assert losses[0].isfinite() or losses[0].abs() > 1e37 or is_zero
        assert all(grad.isfinite().all() for grad in grads if grad.dtype != torch.float16)


def check_candidates(out: tuple[Tensor, ...], call: dict) -> None:
    found, scores, classes = out
    num = sum(min(call["topk"], x[0].numel() if len(x) else x[:1].numel()) for x in call["logits"])
    images = len(call["image_sizes"])
    if images:
        assert found.shape == (images, num, 4) and scores.shape == classes.shape == (images, num)
    assert found.dtype == scores.dtype == torch.float32 and classes.dtype == torch.int64
    if found.is_meta:
        return
    assert ((classes >= -1) & (classes < call["logits"][0].shape[1])).all()
    assert ((scores >= 0) & (scores <= 1)).all() and (scores[classes < 0] == 0).all()
    assert found.isfinite().all()


def check_indices(out: Tensor, call: dict) -> None:
    assert out.dtype == torch.int64 and out.dim() == 1
    assert len(out.unique()) == len(out) and (out < len(call["boxes"])).all() and (out >= 0).all()


def check_detections(out: tuple[Tensor, ...], call: dict) -> None:
    found, scores, classes, counts = out
    shape = (len(call["boxes"]), call["max_detections"])
    assert found.shape == (*shape, 4) and scores.shape == classes.shape == shape
    assert counts.shape == shape[:1] and counts.dtype == torch.int32
    if not found.is_meta:
        assert ((classes >= 0).sum(1) == counts).all() and not scores.isnan().any()


CALLS = (
    (assign_targets, assign_call, check_targets),
    (sigmoid_focal_loss, focal_call, check_losses),
    (box_loss, box_call, check_losses),
    (select_candidates, select_call, check_candidates),
    (batched_nms, nms_call, check_indices),
    (batched_nms_padded, padded_call, check_detections),
)


# ---- Fuzz target ----


def mutate(value: object, choices: Choices) -> object:
    """Returns ``value`` with a random change, or another value."""
    if isinstance(value, (list, tuple)) and choices.number(4):
        items = list(value)
        how = choices.of(("mutate", "shorten", "repeat", "empty"))
        place = choices.number(max(len(items), 1))
        if how == "mutate" and items:
            items[place] = mutate(items[place], choices)
        items = {"shorten": items[1:], "repeat": items * 5, "empty": []}.get(how, items)
        if hasattr(value, "_fields"):
            return type(value)(*items) if len(items) == len(value) else value
        return items
    if isinstance(value, Tensor) and value.numel() > 2**20:
        return value  # expanded; another change could allocate its memory
    if isinstance(value, Tensor) and choices.number(8):
        try:
            return choices.of(TENSOR_MUTATIONS)(value.detach(), choices)
        except (RuntimeError, TypeError, NotImplementedError):  # torch has no such tensor
            return value
    return choices.of(HOSTILE)


def check(data: bytes) -> None:
    """Checks one call."""
    choices = Choices(data)
    op, make, check_result = choices.of(CALLS)
    scene = Scene(choices)
    call = make(scene, choices)
    for _ in range(choices.of((1, 0, 2, 3))):
        name = choices.of(list(call))
        call[name] = mutate(call[name], choices)
    try:
        out = op(**call)
    except ERRORS as error:
        message = str(error)
        assert op.__name__ in message, f"{op.__name__} is not named: {message[:1000]}"
        assert len(message.splitlines()[0]) < 1000, message[:1000]
        return
    check_result(out, call)
    dense = tree_map_only(Tensor, contiguous, call)
    if any(a is not b for a, b in zip(tree_leaves(dense), tree_leaves(call), strict=True)):
        pairs = zip(tree_leaves(op(**dense)), tree_leaves(out), strict=True)
        assert all(is_close(*pair) for pair in pairs), "the result depends on the memory layout"


def contiguous(x: Tensor) -> Tensor:
    """Returns ``x``, or a contiguous copy if it is not contiguous."""
    if x.is_contiguous():
        return x
    return x.detach().clone(memory_format=torch.contiguous_format)


def is_close(a: Tensor, b: Tensor) -> bool:
    """Returns whether both are equal up to the rounding of sums."""
    return a.is_meta or torch.allclose(a, b, rtol=1e-4, atol=1e-30, equal_nan=True)
