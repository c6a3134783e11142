"""Helpers shared by the references."""

from __future__ import annotations

import torch
from torch import Tensor

from ..levels import Levels


def levels_of(shapes: list[int], strides: list[int], pitches: list[int], offset: float) -> Levels:
    """Builds Levels from flattened pairs."""
    pairs = (tuple(zip(flat[0::2], flat[1::2], strict=True)) for flat in (shapes, pitches))
    shapes, pitches = pairs
    return Levels(shapes, tuple(strides), pitches, offset)


def area(boxes: Tensor, pixel_extent: int = 0) -> Tensor:
    """Tensor[..., 4] -> Tensor[...]; boxes extend ``pixel_extent`` beyond x2 and y2."""
    width, height = (boxes[..., 2:] + pixel_extent - boxes[..., :2]).unbind(dim=-1)
    return width * height


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """Returns float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def maps_to_points(maps: list[Tensor]) -> Tensor:
    """One [B, C, H, W] per level -> [B, P, C]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
