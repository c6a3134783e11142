"""How well pyramid levels fit a dataset: what each level learns, and which would learn more.

A level of stride s has a point every s pixels and learns boxes whose largest distance from a point
lies in its size range (1904.01355 section 3.2). Boxes are in pixels of the network input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from torch import Tensor

from ..modeling.losses import FCOSLoss
from ..modeling.structures import GroundTruth, PointGrid
from ..ops import Levels, Targets
from .records import boxes_of

STRIDES = (4, 8, 16, 32, 64, 128)  # of P2 to P7
REACH = 8  # strides: a level's range ends there in the paper, 64 pixels at stride 8
MISSED = 0.01  # share of the boxes that may lie between the points of the finest level
LARGEST = 0.98  # share of the boxes that the coarsest level must reach


class Sample(NamedTuple):
    """One image at the size of the network input."""

    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # [n, 4], xyxy


def sample_of(record: dict, size: int, max_size: int) -> Sample:
    """The size of the image of a record after INPUT.MIN_SIZE_* and MAX_SIZE_*, and its boxes."""
    height, width = record["height"], record["width"]
    new = ResizeShortestEdge.get_output_shape(height, width, size, max_size)
    boxes = boxes_of([a for a in record["annotations"] if not a.get("iscrowd", 0)])
    return Sample(new, boxes * np.array([new[1] / width, new[0] / height] * 2))


class LevelFit(NamedTuple):
    """The result of assigning the boxes of a dataset to the points of a pyramid."""

    num_images: int
    num_boxes: int
    boxes_per_level: list[int]  # boxes that have a point there; one may have some on two levels
    points_per_level: list[int]  # positive points
    ambiguous: int  # points at which several boxes qualified
    too_small: int  # boxes that have no point although they are alone in the image
    covered: int  # boxes that lose all their points to smaller ones

    @property
    def unserved(self) -> int:
        """Boxes that no point learns."""
        return self.too_small + self.covered


def measure_fit(samples: Iterable[Sample], losses: FCOSLoss, grid: PointGrid) -> LevelFit:
    """Assigns the boxes of all samples as in training, and counts.

    Args:
        samples: images of the dataset.
        losses: the rules of assignment; their classes do not matter.
        grid: where the points lie.
    """
    images = boxes = ambiguous = too_small = covered = 0
    served, points = (np.zeros(len(losses.strides), int) for _ in range(2))
    for sample in samples:
        levels = image_levels(sample.size, grid)
        targets = _assign(sample.boxes, levels, losses)
        positive, several = targets.counts[0].unbind(dim=-1)
        images, boxes = images + 1, boxes + len(sample.boxes)
        points += positive.numpy()
        ambiguous += int(several.sum())
        found = [m.unique() for m in targets.matched[0].split(list(levels.points_per_level))]
        served += [int((level >= 0).sum()) for level in found]
        lost = set(range(len(sample.boxes))) - set(torch.cat(found).tolist())
        alone = sum(_has_point(sample.boxes[[i]], levels, losses) for i in lost)
        covered, too_small = covered + alone, too_small + len(lost) - alone
    return LevelFit(images, boxes, served.tolist(), points.tolist(), ambiguous, too_small, covered)


def image_levels(size: tuple[int, int], grid: PointGrid) -> Levels:
    """The points of an image that is padded only as its coarsest level requires."""

    def empty(stride: int) -> Tensor:
        return torch.empty(1, 1, *(math.ceil(side / stride) for side in size), device="meta")

    return grid.levels([empty(stride) for stride in grid.strides], empty(1))


def _assign(boxes: np.ndarray, levels: Levels, losses: FCOSLoss) -> Targets:
    boxes = torch.from_numpy(boxes).float()
    classes = torch.zeros(len(boxes), dtype=torch.int64)
    return losses.assign(GroundTruth(boxes, classes, torch.tensor([0, len(boxes)])), levels)


def _has_point(box: np.ndarray, levels: Levels, losses: FCOSLoss) -> bool:
    return bool((_assign(box, levels, losses).matched >= 0).any())


class Pyramid(NamedTuple):
    """Levels and the bounds between their size ranges."""

    strides: list[int]
    sizes_of_interest: list[int]


def suggest_pyramid(samples: Sequence[Sample], small: float = math.inf) -> Pyramid:
    """Suggests levels for the boxes of a dataset, by the proportions of the paper.

    The finest stride is the largest at which hardly any box can fall between the points. A level
    ends at 8 strides, and levels are added until they reach nearly all boxes. If one level is
    enough, a second one takes the largest octave.

    Args:
        samples: images with boxes.
        small: pixels on which the finest level should have at least two points.

    Returns:
        at least two levels, between P2 and P7. Boxes narrower than 4 pixels need a larger input.
    """
    boxes = np.concatenate([sample.boxes for sample in samples] or [np.zeros((0, 4))])
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = sides[(sides > 0).all(axis=1)]
    if not len(sides):
        return Pyramid([8, 16, 32, 64, 128], [64, 128, 256, 512])
    # A box of sides w, h holds a point of stride s with probability min(1, w/s) * min(1, h/s).
    missed = [1 - np.minimum(1, sides / stride).prod(axis=1).mean() for stride in STRIDES[:-1]]
    fits = [share <= MISSED and 2 * s <= small for share, s in zip(missed, STRIDES, strict=False)]
    first = max((i for i, does in enumerate(fits) if does), default=0)
    far = np.quantile(sides.max(axis=1) / 2, LARGEST)
    last = next((i for i, s in enumerate(STRIDES) if REACH * s >= far), len(STRIDES) - 1)
    strides = list(STRIDES[first : max(last, first + 1) + 1])
    bounds = [REACH * stride for stride in strides[:-1]]
    if last <= first:
        # A box that extends beyond two strides from its center contains a point of the next level.
        bounds = [max(2 * strides[0], round(far / 2))]
    return Pyramid(strides, bounds)


def pyramid_keys(pyramid: Pyramid) -> list[str]:
    """Config lines that set the levels of ``pyramid``."""
    numbers = [stride.bit_length() - 1 for stride in pyramid.strides]
    stages = json.dumps([f"res{n}" for n in numbers if n <= 5] or ["res5"])
    return [
        "MODEL:",
        f"  RESNETS: {{OUT_FEATURES: {stages}}}",
        f"  FPN: {{IN_FEATURES: {stages}}}",
        "  FCOS:",
        f"    IN_FEATURES: {json.dumps([f'p{n}' for n in numbers])}",
        f"    FPN_STRIDES: {pyramid.strides}",
        f"    SIZES_OF_INTEREST: {pyramid.sizes_of_interest}",
        f"    TOP_LEVELS: {max(0, numbers[-1] - 5)}",
    ]
