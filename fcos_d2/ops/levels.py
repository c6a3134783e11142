"""Where the points of a feature pyramid lie in the input image (paper section 3.1).

Shapes: L pyramid levels; P points of all levels together, level-major, row-major inside a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """Geometry of all pyramid levels; plain numbers known on the host.

    Point (row i, column j) of level l lies at ``x = offset * stride_l + j * pitch_x_l`` and
    ``y = offset * stride_l + i * pitch_y_l``, in pixels of the network input.

    Attributes:
        shapes: (height, width) of each level's feature map, in points.
        strides: unit of each level's ltrb distances, in pixels.
        pitches: (vertical, horizontal) spacing of each level's points, in pixels.
        offset: position of the first point as a fraction of the stride, in [0, 1).
    """

    shapes: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    pitches: tuple[tuple[int, int], ...]
    offset: float = 0.5

    @property
    def points_per_level(self) -> tuple[int, ...]:
        """Number of points of each level."""
        return tuple(height * width for height, width in self.shapes)

    @property
    def num_points(self) -> int:
        """Number of points of all levels, P."""
        return sum(self.points_per_level)


def make_levels(
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    offset: float = 0.5,
    image_shape: tuple[int, int] | None = None,
) -> Levels:
    """Creates Levels whose points are spaced by the stride, or by image size // feature size.

    Args:
        shapes: (height, width) of each level's feature map.
        strides: pixels between neighboring points of each level.
        offset: position of the first point as a fraction of the stride; 0.5 is the center of the
            cell (FCOS, AdelaiDet, detectron2), 0 its corner (torchvision, cvpods).
        image_shape: (height, width) in pixels of the padded input. If given, the spacing is
            ``image size // feature size`` as in torchvision, which differs from the stride if
            rounding made the feature map larger than the image divided by the stride.

    Raises:
        ValueError: shapes and strides differ in length, a stride is not positive, or a size is
            negative.
    """
    # Under torch.export, sizes must stay symbolic: int() would make them constants.
    shapes, strides = tuple((h, w) for h, w in shapes), tuple(int(s) for s in strides)
    if len(shapes) != len(strides):
        raise ValueError(
            f"make_levels: expected one stride per level, got {len(shapes)} shapes and "
            f"{len(strides)} strides; set MODEL.FCOS.FPN_STRIDES to one stride per IN_FEATURES"
        )
    if any(s <= 0 for s in strides) or any(h < 0 or w < 0 for h, w in shapes):
        raise ValueError(
            f"make_levels: expected strides > 0 and sizes >= 0, got {strides}, {shapes}"
        )
    if image_shape is None:
        pitches = tuple((s, s) for s in strides)
    else:
        height, width = image_shape
        pitches = tuple(
            (height // torch.sym_max(h, 1), width // torch.sym_max(w, 1)) for h, w in shapes
        )
    return Levels(shapes, strides, pitches, float(offset))


def point_coordinates(levels: Levels, device: torch.device | str = "cpu") -> Tensor:
    """Computes the coordinates of all points.

    Returns:
        float32 Tensor[P, 2], (x, y) in pixels of the network input.
    """
    points = [torch.empty(0, 2, device=device)]
    for (height, width), stride, (pitch_y, pitch_x) in zip(
        levels.shapes, levels.strides, levels.pitches, strict=True
    ):
        y = torch.arange(height, device=device, dtype=torch.float32) * pitch_y
        x = torch.arange(width, device=device, dtype=torch.float32) * pitch_x
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((grid_x, grid_y), dim=-1).view(-1, 2) + levels.offset * stride)
    return torch.cat(points)


def spread_over_points(values: Sequence[float], levels: Levels, device: torch.device) -> Tensor:
    """Expands one value per level to float32 Tensor[P], the value of each point's level."""
    return torch.cat(
        [torch.empty(0, device=device)]
        + [
            torch.full((count,), float(value), device=device)
            for value, count in zip(values, levels.points_per_level, strict=True)
        ]
    )
