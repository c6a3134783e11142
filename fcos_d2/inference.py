"""Trained detectors: loading, evaluation, and prediction on images. Imports no training engine."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn

from .checkpoint import Checkpointer
from .config import fcos_settings
from .config_file import choose_device, read_cfg
from .data import FCOSDatasetMapper, check_num_classes, class_names, load_dataset
from .errors import InputError, one_line_cause
from .evaluation import (
    THRESHOLD_FILE,
    ThresholdEvaluator,
    Thresholds,
    evaluator_for,
    read_thresholds,
)
from .modeling import FCOS
from .modeling.tta import FCOSWithTTA

FINAL_WEIGHTS = "model_final.pth"

logger = logging.getLogger(__name__)


def build_detector(cfg) -> nn.Module:
    """detectron2's ``build_model``, compiled if MODEL.COMPILE.

    Raises:
        InputError: values of the config that do not fit together.
    """
    try:
        model = build_model(cfg)
    except ValueError as error:
        if str(error).startswith("FCOS"):
            raise InputError(one_line_cause(error)) from error
        raise
    if cfg.MODEL.COMPILE:
        # In place, so that checkpoints stay as they are. Losses and detections are operators
        # that a compiler could not improve.
        model.backbone.compile()
        model.head.compile()
    return model


def load_detector(cfg, weights: str | None = None, *, resume: bool = False) -> nn.Module:
    """The trained detector of ``cfg``, in evaluation mode.

    Args:
        cfg: of ``setup_cfg`` or ``read_cfg``. With MODEL_EMA.ENABLED it gets the average of the
            weights if the checkpoint has one.
        weights: file or URL instead of MODEL.WEIGHTS.
        resume: take the last checkpoint in OUTPUT_DIR, if there is one.

    Raises:
        InputError: weights that cannot be used.
    """
    model = build_detector(cfg).eval()
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.averaged = cfg.MODEL_EMA.ENABLED
    checkpointer.resume_or_load(weights or cfg.MODEL.WEIGHTS, resume=resume)
    return model


def evaluate(cfg, resume: bool = False) -> OrderedDict:
    """Results on DATASETS.TEST of the weights in MODEL.WEIGHTS.

    Args:
        cfg: of ``setup_cfg``; see ``load_detector``.
        resume: evaluate the last checkpoint in OUTPUT_DIR instead.

    Raises:
        InputError: weights or data that cannot be used; TEST.AUG of a model that is no FCOS.
    """
    model = load_detector(cfg, resume=resume)
    if cfg.TEST.AUG.ENABLED:
        with_tta(cfg, model)  # refuses what it cannot do before the plain evaluation, not after it
    folder = Path(cfg.MODEL.WEIGHTS).parent
    is_beside = not resume and Path(cfg.MODEL.WEIGHTS).is_file() and os.access(folder, os.W_OK)
    folder = str(folder) if is_beside else cfg.OUTPUT_DIR
    evaluators = [build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
    results = test(cfg, model, evaluators)
    if cfg.TEST.AUG.ENABLED:
        results.update(test_with_tta(cfg, model))
    return results


def test(cfg, model: nn.Module, evaluators: Sequence[DatasetEvaluator]) -> OrderedDict:
    """Results of ``model`` on DATASETS.TEST, by name of the data set where there are several."""
    results = OrderedDict()
    for name, evaluator in zip(cfg.DATASETS.TEST, evaluators, strict=True):
        results[name] = inference_on_dataset(model, build_test_loader(cfg, name), evaluator)
        if comm.is_main_process():
            logger.info(f"Evaluation results for {name} in csv format:")
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def with_tta(cfg, model: nn.Module) -> FCOSWithTTA:
    """``model``, with the test-time augmentation of TEST.AUG.

    Raises:
        InputError: it is no FCOS.
    """
    if not isinstance(model, FCOS):
        raise InputError(
            "TEST.AUG.ENABLED needs MODEL.META_ARCHITECTURE FCOS, "
            f"got {cfg.MODEL.META_ARCHITECTURE}; set TEST.AUG.ENABLED False"
        )
    return FCOSWithTTA(cfg, model)


def build_test_loader(cfg, dataset_name: str):
    """detectron2's, with FCOSDatasetMapper and checked data."""
    records = load_dataset(dataset_name, filter_empty=False)
    check_num_classes(dataset_name, fcos_settings(cfg).NUM_CLASSES)
    return build_detection_test_loader(
        records,
        mapper=FCOSDatasetMapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_evaluator(cfg, dataset_name: str, weights_folder: str | None = None) -> DatasetEvaluator:
    """The evaluator of the data set's type (``evaluator_type`` in its metadata).

    On the first data set the best score thresholds are measured too, and written into
    ``weights_folder`` (OUTPUT_DIR where None). Not on LVIS, whose images name no more than some
    of the objects in them, so that a right detection may count as wrong.
    """
    evaluator = evaluator_for(dataset_name, f"{cfg.OUTPUT_DIR}/inference")
    is_lvis = MetadataCatalog.get(dataset_name).evaluator_type == "lvis"
    if dataset_name != cfg.DATASETS.TEST[0] or is_lvis:
        return evaluator
    thresholds = ThresholdEvaluator(dataset_name, weights_folder or cfg.OUTPUT_DIR)
    return DatasetEvaluators([evaluator, thresholds])


def test_with_tta(cfg, model: nn.Module) -> OrderedDict:
    """Results with test-time augmentation (TEST.AUG), as ``*_TTA``.

    The folder ``inference_TTA`` keeps its detections.

    Raises:
        InputError: a model that is no FCOS.
    """
    augmented = with_tta(cfg, model)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0  # every view is made from the original image
    folder = f"{cfg.OUTPUT_DIR}/inference_TTA"
    evaluators = [evaluator_for(name, folder) for name in cfg.DATASETS.TEST]
    results = test(cfg, augmented, evaluators)
    return OrderedDict((f"{key}_TTA", value) for key, value in results.items())


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
