"""Compares all losses, with assignment, forward and backward, with detectron2."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fcos_d2.ops import assign_targets
from fcos_d2.ops.fcos_loss import fcos_loss

from .measure import Row, compare, graph_of
from .peers import needs
from .workload import (
    CLASSES,
    LEVELS,
    RANGES,
    TARGET_BYTES,
    Batch,
    make_batch,
    name_of,
    size_in_bytes,
)

OPTIONS = dict(
    cls_weight=1.0, alpha=0.25, gamma=2.0, save_gradient=True,
    loss_type="giou", quality_type="centerness", weight_by_centerness=True, smoothing=0.0,
)  # fmt: skip


def run(images: int, device: torch.device) -> list[Row]:
    """Returns rows for 100 objects per image, in float32 and bfloat16."""
    return [row for dtype in (torch.float32, torch.bfloat16) for row in _run(images, device, dtype)]


def losses_of(batch: Batch) -> Callable:
    """Returns a function that computes targets, normalizers, losses and gradients of a batch."""
    maps = [*batch.logits, *batch.ltrb, *batch.quality]

    def run():
        truth = (batch.boxes, batch.classes, batch.offsets)
        targets = assign_targets(*truth, LEVELS, RANGES, num_classes=CLASSES)
        positives, centerness = targets.totals.unbind()
        normalizers = (positives, 1.0), (centerness, 1e-6), (positives, 1.0)
        predictions = batch.logits, batch.ltrb, batch.quality
        cls, box, quality = fcos_loss(*predictions, targets, normalizers, **OPTIONS)
        return torch.autograd.grad(cls + box + quality, maps)

    return run


def _run(images: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    batch = make_batch(images, 100, device, dtype)
    maps = [*batch.logits, *batch.ltrb, *batch.quality]
    ours = losses_of(batch)
    peers = {**graph_of(ours, device), **_detectron2(images, batch, maps, device)}
    floor = 2 * size_in_bytes(maps) + TARGET_BYTES * images * LEVELS.num_points
    workload = f"{images} x 100 boxes, {name_of(dtype)}"
    return compare("all losses", workload, {"ours": ours, **peers}, device, floor)


@needs("detectron2")
def _detectron2(images, batch, maps, device):
    from detectron2.utils.events import EventStorage

    from .detectron2_fcos import make_images, make_instances, make_model

    model, pixels = make_model(device), make_images(images, device)
    instances = make_instances(batch)

    def losses():
        with EventStorage():
            predictions = (batch.logits, batch.ltrb, batch.quality)
            losses = model.forward_training(pixels, batch.logits, predictions, instances)
            return torch.autograd.grad(sum(losses.values()), maps)

    return {"detectron2": losses}
