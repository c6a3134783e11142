"""The whole loss (assignment, classification, box, quality; forward and backward)."""

from __future__ import annotations

import torch
from detectron2.utils.events import EventStorage

from fcos_d2.ops import assign_targets, box_loss, sigmoid_focal_loss

from .measure import Row, compare
from .workload import CLASSES, LEVELS, RANGES, detectron2_fcos, image_list, make_batch


def run(images: int, device: torch.device) -> list[Row]:
    """100 objects per image, float32."""
    batch = make_batch(images, 100, device)
    maps = [*batch.logits, *batch.ltrb, *batch.quality]
    model = detectron2_fcos(device)
    pixels = image_list(images, device)

    def ours():
        truth = (batch.boxes, batch.classes, batch.offsets)
        targets = assign_targets(*truth, LEVELS, RANGES, num_classes=CLASSES)
        cls = sigmoid_focal_loss(batch.logits, targets.labels)
        box, quality = box_loss(batch.ltrb, batch.quality, targets)
        positives = targets.counts[..., 0].sum().clamp(min=1)
        total = (cls + quality) / positives + box / targets.centerness.sum().clamp(min=1e-6)
        return torch.autograd.grad(total, maps)

    def detectron2():
        with EventStorage():
            predictions = (batch.logits, batch.ltrb, batch.quality)
            losses = model.forward_training(pixels, batch.logits, predictions, batch.instances)
            return torch.autograd.grad(sum(losses.values()), maps)

    return compare(
        "all losses", f"{images} x 100 boxes", {"ours": ours, "detectron2": detectron2}, device
    )
