"""The whole loss (assignment, classification, box, quality; forward and backward)."""

from __future__ import annotations

import torch
from detectron2.utils.events import EventStorage

from fcos_d2.ops import assign_targets, box_loss, sigmoid_focal_loss

from .measure import Row, compare
from .workload import (
    CLASSES,
    LEVELS,
    RANGES,
    TARGET_BYTES,
    detectron2_fcos,
    image_list,
    make_batch,
    size_in_bytes,
)


def run(images: int, device: torch.device) -> list[Row]:
    """100 objects per image, float32."""
    batch = make_batch(images, 100, device)
    maps = [*batch.logits, *batch.ltrb, *batch.quality]
    model = detectron2_fcos(device)
    pixels = image_list(images, device)

    def ours():
        truth = (batch.boxes, batch.classes, batch.offsets)
        targets = assign_targets(*truth, LEVELS, RANGES, num_classes=CLASSES)
        positives = targets.counts[..., 0].sum().clamp(min=1)
        cls = sigmoid_focal_loss(
            batch.logits, targets.labels, scale=1 / positives, save_gradient=True
        )
        box, quality = box_loss(batch.ltrb, batch.quality, targets)
        total = cls + quality / positives + box / targets.centerness.sum().clamp(min=1e-6)
        return torch.autograd.grad(total, maps)

    def detectron2():
        with EventStorage():
            predictions = (batch.logits, batch.ltrb, batch.quality)
            losses = model.forward_training(pixels, batch.logits, predictions, batch.instances)
            return torch.autograd.grad(sum(losses.values()), maps)

    contenders = {"ours": ours, "detectron2": detectron2}
    floor = 2 * size_in_bytes(maps) + TARGET_BYTES * images * LEVELS.num_points
    return compare("all losses", f"{images} x 100 boxes", contenders, device, floor)
