"""Detects objects in images that are much larger than the network input, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .errors import InputError
from .ops import batched_nms
from .predictor import Prediction, Predictor

MARGIN = 2.0  # pixels; a box closer to the border of a tile counts as cut off
MIN_TILE = 32  # pixels


class Tile(NamedTuple):
    """Region of an image, in pixels."""

    x: int
    y: int
    right: int
    bottom: int


class TiledPredictor:
    """Applies a ``Predictor`` to overlapping tiles of each image and to the whole image.

    Tiles overlap by half, so that every object of up to half a tile lies completely inside one of
    them; detections that are cut off at the inner border of a tile are dropped. Larger objects are
    detected in the whole image. One NMS merges all detections.

    Args:
        predictor: applied to tiles as to images, including the resizing.
        tile: side of a tile in pixels, such as that of the crops used in training.
        iou_threshold: threshold of the NMS that merges the detections.
        batch_size: number of tiles per forward pass.

    Raises:
        InputError: ``tile`` is too small.
    """

    def __init__(
        self, predictor: Predictor, tile: int, iou_threshold: float = 0.6, batch_size: int = 4
    ):
        if tile < MIN_TILE:
            raise InputError(f"--tile must be at least {MIN_TILE} pixels, got {tile}")
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
        parts = [(whole, whole.boxes, np.flatnonzero(sides > self._tile / 2))]
        for first in range(0, len(tiles), self._batch_size):
            batch = tiles[first : first + self._batch_size]
            found = self._predictor.predict([image[t.y : t.bottom, t.x : t.right] for t in batch])
            for tile, part in zip(batch, found, strict=True):
                boxes = part.boxes + np.array([tile.x, tile.y] * 2, np.float32)
                kept = np.flatnonzero(~_is_cut(boxes, tile, (width, height)))
                parts.append((part, boxes, kept))
        return self._merge(image, parts)

    def _merge(
        self, image: np.ndarray, parts: Sequence[tuple[Prediction, np.ndarray, np.ndarray]]
    ) -> Prediction:
        """Applies NMS to the ``kept`` detections of all (prediction, boxes in the image, kept)."""
        boxes = np.concatenate([boxes[kept] for _, boxes, kept in parts])
        scores = np.concatenate([part.scores[kept] for part, _, kept in parts])
        classes = np.concatenate([part.classes[kept] for part, _, kept in parts])
        names = [part.names[i] for part, _, kept in parts for i in kept]
        ids = [part.category_ids[i] for part, _, kept in parts for i in kept]
        arrays = map(torch.from_numpy, (boxes, scores, classes))
        best = batched_nms(*arrays, self._iou_threshold).numpy()
        names, ids = ([values[i] for i in best] for values in (names, ids))
        return Prediction(image, boxes[best], scores[best], classes[best], names, ids)


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
    """Returns whether each box reaches an inner border of the tile; bool [n]."""
    width, height = size
    left = (boxes[:, 0] < tile.x + MARGIN) & (tile.x > 0)
    top = (boxes[:, 1] < tile.y + MARGIN) & (tile.y > 0)
    right = (boxes[:, 2] > tile.right - MARGIN) & (tile.right < width)
    bottom = (boxes[:, 3] > tile.bottom - MARGIN) & (tile.bottom < height)
    return left | top | right | bottom
