"""Compares assign_targets with detectron2's label_anchors."""

from __future__ import annotations

import torch

from fcos_d2.ops import assign_targets

from .measure import Row, compare
from .peers import needs
from .workload import CLASSES, LEVELS, RANGES, TARGET_BYTES, make_batch


def run(images: int, device: torch.device) -> list[Row]:
    """Returns rows for 8, 100 and 1000 objects per image."""
    rows = []
    for boxes in (8, 100, 1000):
        batch = make_batch(images, boxes, device)
        truth = (batch.boxes, batch.classes, batch.offsets)
        contenders = {
            "ours": lambda truth=truth: assign_targets(*truth, LEVELS, RANGES, num_classes=CLASSES),
            **_detectron2(batch, device),
        }
        workload, floor = f"{images} x {boxes} boxes", TARGET_BYTES * images * LEVELS.num_points
        rows += compare("assign_targets", workload, contenders, device, floor)
    return rows


@needs("detectron2")
def _detectron2(batch, device):
    from .detectron2_fcos import make_instances, make_model

    model, instances = make_model(device), make_instances(batch)
    anchors = model.anchor_generator([x.detach() for x in batch.logits])
    return {"detectron2": lambda: model.label_anchors(anchors, instances)}
