"""Detection on images: a trained detector that takes files or arrays and returns plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from .config_file import choose_device, read_cfg
from .data import class_names
from .data.images import read_image
from .errors import InputError
from .evaluation import THRESHOLD_FILE, Thresholds, read_thresholds
from .inference import load_detector

FINAL_WEIGHTS = "model_final.pth"


class Prediction(NamedTuple):
    """What was found in an image, best first.

    Attributes:
        boxes: float32 [n, 4], xyxy in pixels of the image.
        classes: n numbers in [0, K).
        scores: n numbers in [0, 1].
    """

    boxes: np.ndarray
    classes: list[int]
    scores: list[float]


class Predictor:
    """Detects objects in images of any size.

    Args:
        model: a detectron2 detector, in evaluation mode, on its device.
        resize: shortest side and longest side of the network input, in pixels; a shortest side of
            0 leaves images as they are.
        input_format: channel order of the network input, as in INPUT.FORMAT.
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

    @classmethod
    def from_config(
        cls,
        config_file: str,
        opts: Sequence[str] = (),
        weights: str = "",
        threshold: float | None = None,
    ) -> Predictor:
        """The predictor of a trained model.

        Args:
            config_file: the config that the model was trained with.
            opts: KEY VALUE pairs that override it.
            weights: file or URL. Where empty, MODEL.WEIGHTS of ``opts``, or else what training left
                in OUTPUT_DIR. With MODEL_EMA.ENABLED their average counts, as in evaluation.
            threshold: lowest score of all classes. None: those measured in the last evaluation,
                from the folder of the weights; 0.5 where there are none.

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
        return cls(model, size, cfg.INPUT.FORMAT, threshold, names)

    def __call__(self, image: str | PathLike | np.ndarray) -> Prediction:
        """What is found in one image: a file, or uint8 [H, W, 3] RGB."""
        return self.predict([image])[0]

    @torch.no_grad()
    def predict(self, images: Sequence[str | PathLike | np.ndarray]) -> list[Prediction]:
        """The same for images that go through the network together; their sizes may differ."""
        outputs = self._model([self._prepare(image) for image in images])
        return [self._select(output["instances"].to("cpu")) for output in outputs]

    def _prepare(self, image: str | PathLike | np.ndarray) -> dict:
        if not isinstance(image, np.ndarray):
            image = read_image(image, "RGB")
        height, width = image.shape[:2]
        image = convert_PIL_to_numpy(Image.fromarray(image), self._input_format)
        if self._resize[0]:
            size = T.ResizeShortestEdge.get_output_shape(height, width, *self._resize)
            size = [max(1, side) for side in size]  # of an image that is nothing but an edge
            image = T.ResizeTransform(height, width, *size).apply_image(image)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": pixels, "height": height, "width": width}

    def _select(self, found: Instances) -> Prediction:
        scores, classes = found.scores.numpy(), found.pred_classes.numpy()
        limits = self._thresholds[classes] if self._thresholds.ndim else self._thresholds
        # Written as text, a float32 threshold may come back a little above the score it was.
        keep = np.flatnonzero(scores >= limits - 1e-6)
        keep = keep[np.argsort(-scores[keep], kind="stable")]
        boxes = found.pred_boxes.tensor.numpy()[keep]
        return Prediction(boxes, classes[keep].tolist(), scores[keep].tolist())


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
