"""The standard workload: 800x1344 images, five levels, 80 classes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fcos_d2.ops import Levels, make_levels

HEIGHT, WIDTH, CLASSES = 800, 1344, 80
STRIDES = (8, 16, 32, 64, 128)
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))
LEVELS: Levels = make_levels([(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)], STRIDES)
TARGET_BYTES = 28  # per point: label, matched box, four distances, centerness


class Batch(NamedTuple):
    """Inputs of all ops."""

    logits: list[Tensor]  # [B, K, H, W]
    ltrb: list[Tensor]  # [B, 4, H, W], in strides
    quality: list[Tensor]  # [B, 1, H, W]
    boxes: Tensor  # [M, 4]
    classes: Tensor  # [M]
    offsets: Tensor  # [B + 1]
    sizes: Tensor  # [B, 2]


def make_batch(images: int, boxes: int, device: torch.device, dtype=torch.float32) -> Batch:
    """Creates ``images`` images with ``boxes`` objects each, log-uniform from 4 to 700 pixels."""
    generator = torch.Generator().manual_seed(0)

    def maps(channels, scale, shift):
        return [
            (torch.randn(images, channels, h, w, generator=generator) * scale + shift)
            .to(device, dtype)
            .requires_grad_()
            for h, w in LEVELS.shapes
        ]

    limit = torch.tensor([WIDTH, HEIGHT], dtype=torch.float32)
    size = torch.exp(torch.rand(images * boxes, 2, generator=generator) * math.log(700 / 4)) * 4
    corner = torch.rand(images * boxes, 2, generator=generator) * (limit - size)
    packed = torch.cat((corner, corner + size), dim=1).to(device)
    classes = torch.randint(CLASSES, (images * boxes,), generator=generator).to(device)
    ltrb = [x.detach().abs().requires_grad_() for x in maps(4, 2.0, 3.0)]
    return Batch(
        maps(CLASSES, 1.0, -5.0),
        ltrb,
        maps(1, 1.0, 0.0),
        packed,
        classes,
        torch.arange(images + 1, device=device) * boxes,
        torch.tensor([[HEIGHT, WIDTH]] * images, device=device),
    )


def size_in_bytes(tensors: list[Tensor]) -> int:
    """Returns the size of all elements together."""
    return sum(x.numel() * x.element_size() for x in tensors)


def name_of(dtype: torch.dtype) -> str:
    """Returns the name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")
