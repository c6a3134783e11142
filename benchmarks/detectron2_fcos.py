"""Builds detectron2's FCOS and its inputs for the standard workload."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from .workload import CLASSES, HEIGHT, STRIDES, WIDTH, Batch


class _Backbone(nn.Module):
    size_divisibility = 32

    def output_shape(self):
        return {f"p{i + 3}": ShapeSpec(channels=16, stride=s) for i, s in enumerate(STRIDES)}


def make_model(device: torch.device) -> FCOS:
    """Builds the model, of which only the parts after the convolutions are used."""
    backbone = _Backbone()
    shapes = list(backbone.output_shape().values())
    head = FCOSHead(
        input_shape=shapes, conv_dims=[16], num_classes=CLASSES, prior_prob=0.01, norm=""
    )
    model = FCOS(
        backbone=backbone, head=head, num_classes=CLASSES, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3
    )
    return model.to(device)


def make_images(images: int, device: torch.device) -> ImageList:
    """Returns uninitialized images; only their sizes are used."""
    tensor = torch.empty(images, 3, HEIGHT, WIDTH, device=device)
    return ImageList(tensor, [(HEIGHT, WIDTH)] * images)


def make_instances(batch: Batch) -> list[Instances]:
    """Returns the ground truth of every image."""
    counts = batch.offsets.diff().tolist()
    return [
        Instances((HEIGHT, WIDTH), gt_boxes=Boxes(boxes), gt_classes=classes)
        for boxes, classes in zip(
            batch.boxes.split(counts), batch.classes.split(counts), strict=True
        )
    ]
