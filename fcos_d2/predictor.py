"""Runs a trained detector on image files or arrays; returns NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import BoxMode, Instances
from PIL import Image, ImageOps
from torch import nn

from . import model_zoo
from .config_file import choose_device, read_cfg
from .data import find_classes
from .data.images import read_image
from .errors import InputError, import_optional
from .evaluation.thresholds import THRESHOLD_FILE, Thresholds, read_thresholds
from .inference import accelerated, load_detector
from .visualization.boxes import PANEL_SIDE, class_color, draw_boxes

FINAL_WEIGHTS = "model_final.pth"


@dataclass(frozen=True, eq=False)
class Prediction:
    """Detections in an image, by descending score.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        boxes: float32 [n, 4], xyxy in pixels of the image.
        scores: float32 [n] in [0, 1].
        classes: int64 [n] in [0, K).
        names: n class names; class indices as strings if the names are unknown.
        category_ids: n ids of the classes in the dataset; ``classes`` if the dataset is unknown.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: list[str]
    category_ids: list[int]

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self, scale: float | None = None) -> np.ndarray:
        """Draws boxes, names and scores on the image.

        Args:
            scale: factor by which the image is enlarged; None enlarges small images to fit labels.

        Returns:
            uint8 [H * scale, W * scale, 3], RGB.
        """
        scale = scale or max(1.0, PANEL_SIDE / max(self.image.shape[:2]))
        colors = [class_color(c) for c in self.classes.tolist()]
        return draw_boxes(self.image, self.boxes, self.names, self.scores, colors, scale)

    def to_coco(self, image_id: int | str = 0) -> list[dict]:
        """Returns the entries of a COCO result file, with ``bbox`` as x, y, width, height."""
        boxes = BoxMode.convert(self.boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
        rows = zip(self.category_ids, boxes, self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in rows
        ]

    def to_supervision(self):
        """Returns the detections as ``supervision.Detections``.

        Raises:
            InputError: supervision is not installed.
        """
        return import_optional("supervision", "to_supervision").Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.classes,
            data={"class_name": np.array(self.names, dtype=str)},
        )


class Predictor:
    """Detects objects in images of any size.

    Args:
        model: a detectron2 detector in evaluation mode.
        resize: shortest side and maximum longest side of the network input, in pixels; a shortest
            side of 0 disables resizing.
        input_format: channel order of the network input, as in INPUT.FORMAT.
        thresholds: score threshold of each class, [K], or of all classes.
        names: class names, [K]; None to use class indices.
        category_ids: ids of the classes in the dataset, [K]; None to use class indices.

    Attributes:
        class_names: ``names``.
    """

    def __init__(
        self,
        model: nn.Module,
        resize: tuple[int, int],
        input_format: str,
        thresholds: Sequence[float] | float,
        names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
    ):
        self._model, self._resize, self._input_format = model, resize, input_format
        self._thresholds = np.asarray(thresholds, dtype=float)
        self.class_names, self._category_ids = names, category_ids

    @classmethod
    def from_config(
        cls,
        config_file: str,
        opts: Sequence[str] = (),
        weights: str = "",
        threshold: float | None = None,
    ) -> Predictor:
        """Loads the predictor of a trained model.

        Args:
            config_file: config that the model was trained with.
            opts: KEY VALUE pairs that override it.
            weights: file or URL; by default MODEL.WEIGHTS if ``opts`` sets it, and else the final
                weights in OUTPUT_DIR. With MODEL_EMA.ENABLED, loads the EMA, as evaluation does.
            threshold: score threshold of all classes; None for those measured in the last
                evaluation and saved next to the weights, or 0.5 if there are none.

        Raises:
            InputError: config, weights or thresholds are missing or do not fit together.
        """
        cfg = read_cfg(config_file, opts)
        choose_device(cfg)
        num_classes = cfg.MODEL.FCOS.NUM_CLASSES
        if not weights and "MODEL.WEIGHTS" in opts[::2]:
            weights = cfg.MODEL.WEIGHTS
        weights = weights or _final_weights(cfg.OUTPUT_DIR)
        model = accelerated(cfg, load_detector(cfg, weights))
        measured = _find_thresholds(Path(weights).parent, num_classes)
        dataset, names = find_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), num_classes)
        names = measured.class_names if measured else names
        if threshold is None:
            threshold = measured.scores if measured else 0.5
        size = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        return cls(model, size, cfg.INPUT.FORMAT, threshold, names, _category_ids(dataset))

    @classmethod
    def from_pretrained(
        cls, name: str, threshold: float | None = None, device: str | None = None
    ) -> Predictor:
        """Loads a model with published weights, which are downloaded on first use.

        Args:
            name: key of ``fcos_d2.model_zoo.WEIGHTS``, such as "torchvision/fcos_R_50_FPN".
            threshold: score threshold of all classes; None for 0.5.
            device: a device such as "cpu"; None for the GPU if there is one.

        Raises:
            InputError: there is no such model, or its weights cannot be downloaded.
        """
        model_zoo.get_checkpoint_url(name)
        opts = ["MODEL.DEVICE", device] if device else []
        config, weights = model_zoo.get_config_file(name), f"{model_zoo.PREFIX}{name}"
        return cls.from_config(config, opts, weights, threshold)

    def __call__(self, image: str | PathLike | Image.Image | np.ndarray) -> Prediction:
        """Detects objects in an image: a path, a Pillow image, or uint8 [H, W, 3] RGB."""
        return self.predict([image])[0]

    @torch.no_grad()
    def predict(
        self, images: Sequence[str | PathLike | Image.Image | np.ndarray]
    ) -> list[Prediction]:
        """Detects objects in a batch of images, whose sizes may differ."""
        images = [_as_rgb(image) for image in images]
        outputs = self._model([self._prepare(image) for image in images])
        found = [output["instances"].to("cpu") for output in outputs]
        return [self._select(*pair) for pair in zip(images, found, strict=True)]

    def _prepare(self, image: np.ndarray) -> dict:
        height, width = image.shape[:2]
        image = convert_PIL_to_numpy(Image.fromarray(image), self._input_format)
        if self._resize[0]:
            size = T.ResizeShortestEdge.get_output_shape(height, width, *self._resize)
            size = [max(1, side) for side in size]  # extreme aspect ratios are rounded to 0
            image = T.ResizeTransform(height, width, *size).apply_image(image)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": pixels, "height": height, "width": width}

    def _select(self, image: np.ndarray, found: Instances) -> Prediction:
        scores, classes = found.scores.float().numpy(), found.pred_classes.numpy()
        limits = self._thresholds[classes] if self._thresholds.ndim else self._thresholds
        # Rounding may put a score slightly below the threshold that was measured from it.
        keep = np.flatnonzero(scores >= limits - 1e-6)
        keep = keep[np.argsort(-scores[keep], kind="stable")]
        boxes, scores, classes = found.pred_boxes.tensor.numpy()[keep], scores[keep], classes[keep]
        numbers = classes.tolist()
        names = [str(self.class_names[c]) if self.class_names else str(c) for c in numbers]
        ids = [self._category_ids[c] for c in numbers] if self._category_ids else numbers
        return Prediction(image, boxes, scores, classes, names, ids)


def _final_weights(folder: str) -> str:
    path = Path(folder, FINAL_WEIGHTS)
    if not path.is_file():
        raise InputError(
            f"no weights in {folder}: there is no {FINAL_WEIGHTS}; train first, or pass "
            "--weights FILE"
        )
    return str(path)


def _find_thresholds(folder: Path, num_classes: int) -> Thresholds | None:
    """Reads the thresholds in ``folder``; returns None if there are none."""
    path = folder / THRESHOLD_FILE
    if not path.is_file():
        return None
    measured = read_thresholds(path)
    if len(measured.scores) != num_classes:
        raise InputError(
            f"{path} has {len(measured.scores)} classes, but the model has {num_classes}; evaluate "
            "the model again with train_net.py --eval-only, or remove the file"
        )
    return measured


def _category_ids(dataset: str | None) -> list[int] | None:
    """Returns the dataset's category id of each class; None if they are unknown."""
    if dataset is None:
        return None
    class_of = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id", {})
    return sorted(class_of, key=class_of.get) or None


def _as_rgb(image: str | PathLike | Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, np.ndarray):
        try:
            return read_image(image, "RGB")
        except InputError as error:
            raise InputError(f"{image} cannot be read: {error}") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"Predictor: image must be uint8 [H, W, 3] RGB, got {image.dtype} {list(image.shape)}"
        )
    return image
