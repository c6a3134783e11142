"""Data passed between the parts of the detector.

Shapes: B images, L levels, K classes, M ground-truth boxes of the whole batch, D detections per
image.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..ops import Detections, Levels, make_levels


class Predictions(NamedTuple):
    """Outputs of the head, one tensor per level, in the layout of the convolutions.

    Attributes:
        logits: Tensor[B, K, H, W], class logits.
        ltrb: Tensor[B, 4, H, W], distances to the box's sides in strides, >= 0.
        quality: Tensor[B, 1, H, W], logits of centerness or IoU.
        box_features: Tensor[B, C, H, W], features of the box tower; empty unless requested.
    """

    logits: list[Tensor]
    ltrb: list[Tensor]
    quality: list[Tensor]
    box_features: list[Tensor]


class GroundTruth(NamedTuple):
    """All boxes of a batch, one image after the other.

    Attributes:
        boxes: float32 Tensor[M, 4], xyxy in pixels of the network input.
        classes: int64 Tensor[M] in [0, K), or -1 for a region to ignore.
        offsets: int64 Tensor[B + 1]; image b owns the boxes [offsets[b], offsets[b + 1]).
    """

    boxes: Tensor
    classes: Tensor
    offsets: Tensor


class PointGrid:
    """How points are placed on feature maps; see ``fcos_d2.ops.make_levels``.

    Args:
        strides: pixels between adjacent points, one per level.
        offset: position of the first point as a fraction of the stride.
        pitch: spacing of the points, the "stride" or ("floor") padded image size // feature size.
    """

    def __init__(self, strides: Sequence[int], offset: float = 0.5, pitch: str = "stride"):
        if pitch not in ("stride", "floor"):
            raise ValueError(
                "PointGrid: pitch (MODEL.FCOS.LOCATION_PITCH) must be stride or floor, "
                f"got {pitch!r}"
            )
        self.strides, self.offset, self.pitch = tuple(strides), offset, pitch

    def levels(self, maps: Sequence[Tensor], padded_image: Tensor) -> Levels:
        """Returns the geometry of ``maps`` [B, C, H, W] of ``padded_image`` [B, 3, H, W]."""
        shapes = [tuple(level.shape[-2:]) for level in maps]
        image_shape = tuple(padded_image.shape[-2:]) if self.pitch == "floor" else None
        return make_levels(shapes, self.strides, offset=self.offset, image_shape=image_shape)


def check_choice(key: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError, naming ``MODEL.FCOS.<key>``, unless ``value`` is one of ``choices``."""
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"FCOS: MODEL.FCOS.{key} must be one of {names}, got {value!r}")


def check_number(key: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ValueError, naming ``MODEL.FCOS.<key>``, unless ``value`` is in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"FCOS: MODEL.FCOS.{key} must be in [{low}, {high}], got {value!r}")


def pack_ground_truth(instances: Sequence[Instances]) -> GroundTruth:
    """Packs Instances with ``gt_boxes`` and ``gt_classes``, one per image, into GroundTruth."""
    boxes = torch.cat([image.gt_boxes.tensor for image in instances]).float()
    classes = torch.cat([image.gt_classes for image in instances]).long()
    counts = torch.tensor([0] + [len(image) for image in instances])
    return GroundTruth(boxes, classes, counts.cumsum(0).to(boxes.device, non_blocking=True))


def to_instances(detections: Detections, image_sizes: Sequence[tuple[int, int]]) -> list[Instances]:
    """Converts Detections to Instances(pred_boxes, scores, pred_classes) per image.

    This is the only host synchronization of inference: it needs the number of detections.
    """
    counts = detections.counts.tolist()
    return [
        Instances(
            size,
            pred_boxes=Boxes(detections.boxes[image, :count]),
            scores=detections.scores[image, :count],
            pred_classes=detections.classes[image, :count],
        )
        for image, (size, count) in enumerate(zip(image_sizes, counts, strict=True))
    ]
