"""batched_nms beside both strategies of torchvision."""

from __future__ import annotations

import torch
from torchvision.ops.boxes import _batched_nms_coordinate_trick, _batched_nms_vanilla

from fcos_d2.ops import batched_nms

from .measure import Row, compare
from .workload import CLASSES


def run(images: int, device: torch.device) -> list[Row]:
    """1,000, 5,000 and 20,000 boxes of 80 classes, all kept that survive."""
    rows = []
    for count in (1000, 5000, 20000):
        generator = torch.Generator().manual_seed(0)
        corner = torch.rand(count, 2, generator=generator) * 1000
        size = torch.rand(count, 2, generator=generator) * 100 + 10
        boxes = torch.cat((corner, corner + size), dim=1).to(device)
        scores = torch.rand(count, generator=generator).to(device)
        classes = torch.randint(CLASSES, (count,), generator=generator).to(device)
        arguments = (boxes, scores, classes, 0.6)
        contenders = {
            "ours": lambda a=arguments: batched_nms(*a),
            "torchvision, loop over classes": lambda a=arguments: _batched_nms_vanilla(*a),
            "torchvision, shifted boxes": lambda a=arguments: _batched_nms_coordinate_trick(*a),
        }
        rows += compare("batched_nms", f"{count} boxes", contenders, device)
    return rows
