"""Compares batched_nms with both strategies of torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

from fcos_d2.ops import batched_nms, batched_nms_padded

from .measure import Row, compare, graph_of
from .peers import needs
from .workload import CLASSES, size_in_bytes

THRESHOLD = 0.6


def run(images: int, device: torch.device) -> list[Row]:
    """Returns rows for 1,000 to 20,000 boxes of 80 classes, and for a batch of 1,000 boxes each."""
    rows = []
    for count in (1000, 5000, 20000):
        boxes, scores, classes = random_detections(count, device)
        arguments = (boxes, scores, classes, THRESHOLD)
        contenders = {"ours": lambda a=arguments: batched_nms(*a), **_torchvision(*arguments)}
        floor = size_in_bytes([boxes, scores, classes])
        rows += compare("batched_nms", f"{count} boxes", contenders, device, floor)
    return rows + _batch(images, 1000, device)


def _batch(images: int, count: int, device: torch.device) -> list[Row]:
    """Returns rows for all images in one call; peers get separate classes for each image."""
    boxes, scores, classes = random_detections(images * count, device)
    groups = classes + CLASSES * (torch.arange(images * count, device=device) // count)
    padded = boxes.view(images, count, 4), scores.view(images, count), classes.view(images, count)

    def ours():
        return batched_nms_padded(*padded, iou_threshold=THRESHOLD, max_detections=count)

    peers = {**graph_of(ours, device), **_torchvision(boxes, scores, groups, THRESHOLD)}
    floor = size_in_bytes([boxes, scores, classes])
    return compare(
        "batched_nms", f"{images} images x {count} boxes", {"ours": ours, **peers}, device, floor
    )


@needs("torchvision")
def _torchvision(*arguments):
    from torchvision.ops.boxes import _batched_nms_coordinate_trick, _batched_nms_vanilla

    return {
        "torchvision, loop over classes": lambda: _batched_nms_vanilla(*arguments),
        "torchvision, shifted boxes": lambda: _batched_nms_coordinate_trick(*arguments),
    }


def random_detections(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boxes, scores and classes."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 1000
    size = torch.rand(count, 2, generator=generator) * 100 + 10
    boxes = torch.cat((corner, corner + size), dim=1).to(device)
    scores = torch.rand(count, generator=generator).to(device)
    return boxes, scores, torch.randint(CLASSES, (count,), generator=generator).to(device)
