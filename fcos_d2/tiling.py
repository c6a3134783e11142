"""Detects objects in images far larger than the network's input, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .errors import InputError
from .ops import batched_nms
from .predictor import Prediction, Predictor

MARGIN = 2.0  # pixels; a box this close to the border of a tile counts as cut off
SMALLEST = 32  # pixels, of the side of a tile


class Tile(NamedTuple):
    """A part of an image, in pixels."""

    x: int
    y: int
    right: int
    bottom: int


class TiledPredictor:
    """A ``Predictor`` that is applied to overlapping tiles of each image and to the whole image.

    Tiles overlap by half, so that every object of up to half a tile lies completely inside one of
    them; detections that are cut off at the inner border of a tile are dropped. Larger objects are
    detected in the whole image. One NMS merges all detections.

    Args:
        predictor: applied to tiles like to images, including the resizing.
        tile: side of a tile in pixels, such as that of the crops used in training.
        iou_threshold: threshold of the NMS.
        batch_size: number of tiles per forward pass.

    Raises:
        InputError: ``tile`` is too small.
    """

    def __init__(
        self, predictor: Predictor, tile: int, iou_threshold: float = 0.6, batch_size: int = 4
    ):
        if tile < SMALLEST:
            raise InputError(f"--tile must be at least {SMALLEST} pixels, got {tile}")
        self._predictor, self._tile, self._batch_size = predictor, tile, batch_size
        self._iou_threshold, self.class_names = iou_threshold, predictor.class_names

    def predict(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Detects objects in images, uint8 [H, W, 3] RGB, of any sizes."""
        return [self._predict_one(image) for image in images]

    def _predict_one(self, image: np.ndarray) -> Prediction:
        height, width = image.shape[:2]
        (whole,) = self._predictor.predict([image])
        tiles = list(tiles_of(width, height, self._tile))
        if len(tiles) == 1:
            return whole
        sides = (whole.boxes[:, 2:] - whole.boxes[:, :2]).max(axis=1, initial=0)
        parts, kept = [whole], [np.flatnonzero(sides > self._tile / 2)]
        boxes = [whole.boxes[kept[0]]]
        for first in range(0, len(tiles), self._batch_size):
            batch = tiles[first : first + self._batch_size]
            found = self._predictor.predict([image[t.y : t.bottom, t.x : t.right] for t in batch])
            for tile, part in zip(batch, found, strict=True):
                moved = part.boxes + np.array([tile.x, tile.y] * 2, np.float32)
                parts.append(part)
                kept.append(np.flatnonzero(~_is_cut(moved, tile, (width, height))))
                boxes.append(moved[kept[-1]])
        return self._merged(image, parts, kept, np.concatenate(boxes))

    def _merged(
        self,
        image: np.ndarray,
        parts: Sequence[Prediction],
        kept: Sequence[np.ndarray],
        boxes: np.ndarray,
    ) -> Prediction:
        pairs = list(zip(parts, kept, strict=True))
        scores, classes = (
            np.concatenate([getattr(part, field)[index] for part, index in pairs])
            for field in ("scores", "classes")
        )
        arrays = [torch.from_numpy(array) for array in (boxes, scores, classes)]
        best = batched_nms(*arrays, self._iou_threshold).numpy()
        names, ids = (
            [getattr(part, field)[i] for part, index in pairs for i in index]
            for field in ("names", "category_ids")
        )
        return Prediction(
            image,
            boxes[best],
            scores[best],
            classes[best],
            [names[i] for i in best],
            [ids[i] for i in best],
        )


def tiles_of(width: int, height: int, side: int) -> Iterator[Tile]:
    """Yields tiles that cover an image and overlap by at least half their side, row by row."""
    for y in _starts(height, side):
        for x in _starts(width, side):
            yield Tile(x, y, min(x + side, width), min(y + side, height))


def _starts(length: int, side: int) -> list[int]:
    """Returns positions evenly spaced from 0 to ``length - side``, at most half a side apart."""
    if length <= side:
        return [0]
    count = -(-(length - side) // (side // 2)) + 1
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def _is_cut(boxes: np.ndarray, tile: Tile, size: tuple[int, int]) -> np.ndarray:
    """Returns whether boxes reach an inner border of their tile; bool [n]."""
    width, height = size
    low = (boxes[:, 0] < tile.x + MARGIN) & (tile.x > 0)
    top = (boxes[:, 1] < tile.y + MARGIN) & (tile.y > 0)
    high = (boxes[:, 2] > tile.right - MARGIN) & (tile.right < width)
    bottom = (boxes[:, 3] > tile.bottom - MARGIN) & (tile.bottom < height)
    return low | top | high | bottom
