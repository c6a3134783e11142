"""Measures how well pyramid levels fit a dataset, and suggests levels.

A level of stride s has a point every s pixels and is assigned boxes whose largest distance from a
point to a side lies in its size range (1904.01355 section 3.2). Boxes are in pixels of the network
input.
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
from .records import xyxy_boxes

STRIDES = (4, 8, 16, 32, 64, 128)  # P2 to P7
REACH = 8  # upper bound of a level's size range in strides, as in the paper: 64 at stride 8
MAX_MISSED = 0.01  # fraction of boxes that may contain no point of the finest level
MIN_REACHED = 0.98  # fraction of boxes that the coarsest level must reach


class Sample(NamedTuple):
    """An image at the size of the network input."""

    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # [n, 4], xyxy


def make_sample(record: dict, size: int, max_size: int) -> Sample:
    """Resizes a record to INPUT.MIN_SIZE_* ``size`` and INPUT.MAX_SIZE_* ``max_size``."""
    height, width = record["height"], record["width"]
    new = ResizeShortestEdge.get_output_shape(height, width, size, max_size)
    boxes = xyxy_boxes([a for a in record["annotations"] if not a.get("iscrowd", 0)])
    return Sample(new, boxes * np.array([new[1] / width, new[0] / height] * 2))


class LevelFit(NamedTuple):
    """Counts of assigning the boxes of a dataset to the points of a pyramid."""

    num_images: int
    num_boxes: int
    boxes_per_level: list[int]  # boxes with a positive point; a box may count on several levels
    points_per_level: list[int]  # positive points
    ambiguous: int  # points that match several boxes
    too_small: int  # boxes that would have no positive point even without other boxes
    covered: int  # boxes that lose all their points to smaller boxes

    @property
    def without_points(self) -> int:
        """Returns the number of boxes without a positive point."""
        return self.too_small + self.covered


def measure_fit(samples: Iterable[Sample], losses: FCOSLoss, grid: PointGrid) -> LevelFit:
    """Assigns the boxes of all samples as in training, and counts the results.

    Args:
        samples: images of the dataset.
        losses: assigns the targets; any number of classes will do.
        grid: locations of the points.
    """
    images = boxes = ambiguous = too_small = covered = 0
    matched, points = (np.zeros(len(losses.strides), int) for _ in range(2))
    for sample in samples:
        levels = image_levels(sample.size, grid)
        targets = _assign(sample.boxes, levels, losses)
        positive, several = targets.counts[0].unbind(dim=-1)
        images, boxes = images + 1, boxes + len(sample.boxes)
        points += positive.numpy()
        ambiguous += int(several.sum())
        found = [m.unique() for m in targets.matched[0].split(list(levels.points_per_level))]
        matched += [int((level >= 0).sum()) for level in found]
        lost = set(range(len(sample.boxes))) - set(torch.cat(found).tolist())
        hidden = sum(_has_point(sample.boxes[[i]], levels, losses) for i in lost)
        covered, too_small = covered + hidden, too_small + len(lost) - hidden
    return LevelFit(images, boxes, matched.tolist(), points.tolist(), ambiguous, too_small, covered)


def image_levels(size: tuple[int, int], grid: PointGrid) -> Levels:
    """Returns the points of an image that is padded only as its coarsest level requires."""

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
    """The levels of a pyramid, and the bounds between their size ranges."""

    strides: list[int]
    sizes_of_interest: list[int]


def suggest_pyramid(samples: Sequence[Sample], small: float = math.inf) -> Pyramid:
    """Suggests levels for the boxes of a dataset, with the proportions of the paper.

    The finest stride is the largest one at which almost all boxes contain a point. The size range
    of a level ends at 8 strides, and levels are added until they reach almost all boxes. If one
    level is enough, a second one gets the largest octave.

    Args:
        samples: images with boxes.
        small: length in pixels within which the finest level has at least two points.

    Returns:
        At least two levels, from P2 to P7. Boxes narrower than 4 pixels need a larger input.
    """
    boxes = np.concatenate([sample.boxes for sample in samples] or [np.zeros((0, 4))])
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = sides[(sides > 0).all(axis=1)]
    if not len(sides):
        return Pyramid([8, 16, 32, 64, 128], [64, 128, 256, 512])
    # A w x h box contains a point of stride s with probability min(1, w/s) * min(1, h/s).
    missed = [1 - np.minimum(1, sides / stride).prod(axis=1).mean() for stride in STRIDES[:-1]]
    fits = [part <= MAX_MISSED and 2 * s <= small for part, s in zip(missed, STRIDES, strict=False)]
    first = max((i for i, is_fit in enumerate(fits) if is_fit), default=0)
    far = np.quantile(sides.max(axis=1) / 2, MIN_REACHED)
    last = next((i for i, s in enumerate(STRIDES) if REACH * s >= far), len(STRIDES) - 1)
    strides = list(STRIDES[first : max(last, first + 1) + 1])
    bounds = [REACH * stride for stride in strides[:-1]]
    if last <= first:
        # A box that extends beyond two strides from its center contains a point of the next level.
        bounds = [max(2 * strides[0], round(far / 2))]
    return Pyramid(strides, bounds)


def pyramid_keys(pyramid: Pyramid) -> list[str]:
    """Returns the config lines that set the levels of ``pyramid``."""
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
