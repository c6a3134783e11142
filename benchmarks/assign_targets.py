"""assign_targets beside detectron2's label_anchors."""

from __future__ import annotations

import torch

from fcos_d2.ops import assign_targets

from .measure import Row, compare
from .workload import CLASSES, LEVELS, RANGES, TARGET_BYTES, detectron2_fcos, make_batch


def run(images: int, device: torch.device) -> list[Row]:
    """8, 100 and 1000 objects per image."""
    rows = []
    model = detectron2_fcos(device)
    for boxes in (8, 100, 1000):
        batch = make_batch(images, boxes, device)
        truth = (batch.boxes, batch.classes, batch.offsets)
        anchors = model.anchor_generator([x.detach() for x in batch.logits])
        contenders = {
            "ours": lambda truth=truth: assign_targets(*truth, LEVELS, RANGES, num_classes=CLASSES),
            "detectron2": lambda anchors=anchors, batch=batch: model.label_anchors(
                anchors, batch.instances
            ),
        }
        workload, floor = f"{images} x {boxes} boxes", TARGET_BYTES * images * LEVELS.num_points
        rows += compare("assign_targets", workload, contenders, device, floor)
    return rows
