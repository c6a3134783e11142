"""A trained detector on pictures: from a config and weights to boxes in pixels of the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from .data import class_names
from .engine import choose_device, load_detector, read_cfg
from .errors import InputError
from .evaluation import THRESHOLD_FILE, Thresholds, read_thresholds

FINAL_WEIGHTS = "model_final.pth"


class Found(NamedTuple):
    """Detections of one picture, best first."""

    boxes: np.ndarray  # [n, 4], xyxy in pixels of the picture
    classes: list[int]
    scores: list[float]


class Predictor:
    """Finds objects in pictures.

    Args:
        model: a detectron2 detector, in evaluation mode, on its device.
        resize: shortest side and longest side of the network input, in pixels.
        input_format: "BGR" or "RGB", channel order of the network input.
        thresholds: lowest score of each class, [K]; one number for all classes.
        names: of the classes; None for numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        resize: tuple[int, int],
        input_format: str,
        thresholds: Sequence[float] | float,
        names: Sequence[str] | None = None,
    ):
        self._model, self._input_format = model, input_format
        self._resize = resize
        self._thresholds, self.class_names = np.asarray(thresholds, dtype=float), names

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Found]:
        """Detections of a batch of pictures, uint8 [H, W, 3] RGB, of any sizes."""
        outputs = self._model([self._prepare(image) for image in images])
        return [self._select(output["instances"].to("cpu")) for output in outputs]

    def _prepare(self, image: np.ndarray) -> dict:
        height, width = image.shape[:2]
        if self._input_format == "BGR":
            image = image[:, :, ::-1]
        size = T.ResizeShortestEdge.get_output_shape(height, width, *self._resize)
        size = [max(1, side) for side in size]  # of a picture that is nothing but an edge
        image = T.ResizeTransform(height, width, *size).apply_image(image)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
        return {"image": pixels, "height": height, "width": width}

    def _select(self, found: Instances) -> Found:
        scores, classes = found.scores.numpy(), found.pred_classes.numpy()
        limits = self._thresholds[classes] if self._thresholds.ndim else self._thresholds
        # Written as text, a float32 threshold may come back a little above the score it was.
        keep = np.flatnonzero(scores >= limits - 1e-6)
        keep = keep[np.argsort(-scores[keep], kind="stable")]
        boxes = found.pred_boxes.tensor.numpy()[keep]
        return Found(boxes, classes[keep].tolist(), scores[keep].tolist())


def build_predictor(
    config_file: str, opts: Sequence[str] = (), weights: str = "", threshold: float | None = None
) -> Predictor:
    """The predictor of a trained model.

    Args:
        config_file: the config that the model was trained with.
        opts: KEY VALUE pairs that override it.
        weights: file or URL. Where empty, MODEL.WEIGHTS of ``opts``, or else what training left in
            OUTPUT_DIR. With MODEL_EMA.ENABLED it is their average that counts, as in evaluation.
        threshold: lowest score of all classes. None: those measured in the last evaluation, from
            the folder of the weights; 0.5 where there are none.

    Raises:
        InputError: config, weights or thresholds that are missing or do not fit each other.
    """
    cfg = read_cfg(config_file, opts)
    choose_device(cfg)
    num_classes = cfg.MODEL.FCOS.NUM_CLASSES
    if not weights and "MODEL.WEIGHTS" in opts[::2]:
        weights = cfg.MODEL.WEIGHTS
    weights = weights or _final_weights(cfg.OUTPUT_DIR)
    model = load_detector(cfg, weights)
    measured = _measured(Path(weights).parent, num_classes)
    datasets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    names = measured.class_names if measured else _names_from_data(datasets, num_classes)
    if threshold is None:
        threshold = measured.scores if measured else 0.5
    size = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return Predictor(model, size, cfg.INPUT.FORMAT, threshold, names)


def _final_weights(folder: str) -> str:
    path = Path(folder, FINAL_WEIGHTS)
    if not path.is_file():
        raise InputError(
            f"no weights in {folder}: there is no {FINAL_WEIGHTS}; train first, or pass "
            "--weights FILE"
        )
    return str(path)


def _measured(folder: Path, num_classes: int) -> Thresholds | None:
    path = folder / THRESHOLD_FILE
    if not path.is_file():
        return None
    measured = read_thresholds(path)
    if len(measured.scores) != num_classes:
        raise InputError(
            f"{path} is for {len(measured.scores)} classes, the model has {num_classes}; evaluate "
            "the model again with train_net.py --eval-only, or remove the file"
        )
    return measured


def _names_from_data(datasets: Sequence[str], num_classes: int) -> list[str] | None:
    """Class names of the first data set that is at hand and has as many classes."""
    for name in datasets:
        try:
            names = class_names(name)
        except InputError:
            continue
        if names and len(names) == num_classes:
            return names
    return None


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of ``size`` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
