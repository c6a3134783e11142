"""Loads and evaluates trained detectors. Imports no training engine."""

from __future__ import annotations

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.modeling import build_model
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .checkpoint import Checkpointer
from .config import fcos_settings
from .data import FCOSDatasetMapper, check_class_order, check_num_classes, load_dataset
from .errors import InputError, one_line_cause
from .evaluation import ThresholdEvaluator, evaluator_for
from .lazy_config import load_lazy
from .modeling import FCOS
from .modeling.acceleration import DTYPES, accelerate, fastest_dtype, use_channels_last
from .modeling.tta import FCOSWithTTA

COCO_DETECTIONS = 100  # per image, detectron2's default

logger = logging.getLogger(__name__)


def build_detector(cfg) -> nn.Module:
    """Builds the model with detectron2's ``build_model``; compiles it if MODEL.COMPILE is set.

    Raises:
        InputError: values of the config do not fit together.
    """
    most, ours = cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.FCOS.POST_NMS_TOPK_TEST
    if cfg.MODEL.META_ARCHITECTURE == "FCOS" and most not in (COCO_DETECTIONS, ours):
        raise InputError(
            f"TEST.DETECTIONS_PER_IMAGE is {most}, but FCOS keeps MODEL.FCOS.POST_NMS_TOPK_TEST "
            f"{ours}; set MODEL.FCOS.POST_NMS_TOPK_TEST {most} instead"
        )
    try:
        if cfg.MODEL.LAZY_CONFIG:
            path, *overrides = cfg.MODEL.LAZY_CONFIG
            model = instantiate(load_lazy(path, overrides).model).to(cfg.MODEL.DEVICE)
        else:
            model = build_model(cfg)
    except ValueError as error:
        if str(error).startswith("FCOS"):
            raise InputError(one_line_cause(error)) from error
        raise
    if cfg.MODEL.COMPILE:
        # In place, so that names in checkpoints do not change. Losses and detections come from
        # ops that a compiler could not improve.
        try:
            model.backbone.compile(mode=cfg.MODEL.COMPILE_MODE)
            model.head.compile(mode=cfg.MODEL.COMPILE_MODE)
        except RuntimeError as error:
            raise InputError(f"MODEL.COMPILE_MODE: {one_line_cause(error)}") from error
    return use_channels_last(model) if cfg.MODEL.CHANNELS_LAST else model


def accelerated(cfg, model: nn.Module) -> nn.Module:
    """Optimizes ``model`` in place for inference in the precision of MODEL.INFERENCE.DTYPE.

    Raises:
        InputError: the precision is unknown, or the device or model does not support it.
    """
    name, device = cfg.MODEL.INFERENCE.DTYPE, torch.device(cfg.MODEL.DEVICE)
    if name == "auto" and isinstance(model, FCOS):
        dtype = fastest_dtype(device)
        logger.info(f"MODEL.INFERENCE.DTYPE auto: {str(dtype).removeprefix('torch.')} on {device}")
        return accelerate(model, dtype)
    if name not in (*DTYPES, "auto"):
        raise InputError(
            f"MODEL.INFERENCE.DTYPE must be one of auto, {', '.join(DTYPES)}, got {name!r}"
        )
    if name == "float16" and device.type == "cpu":
        raise InputError("MODEL.INFERENCE.DTYPE float16 needs a GPU; set it to bfloat16 or auto")
    if name in ("bfloat16", "float16") and not isinstance(model, FCOS):
        raise InputError(
            f"MODEL.INFERENCE.DTYPE {name} needs MODEL.META_ARCHITECTURE FCOS, got "
            f"{cfg.MODEL.META_ARCHITECTURE}; set it to float32"
        )
    return accelerate(model, DTYPES.get(name, torch.float32))


def load_detector(cfg, weights: str | None = None, *, resume: bool = False) -> nn.Module:
    """Loads the trained detector of ``cfg``, in evaluation mode.

    Args:
        cfg: from ``setup_cfg`` or ``read_cfg``. With MODEL_EMA.ENABLED, the EMA is loaded if the
            checkpoint contains one.
        weights: file or URL that replaces MODEL.WEIGHTS.
        resume: load the last checkpoint in OUTPUT_DIR, if there is one.

    Raises:
        InputError: the weights cannot be used.
    """
    model = build_detector(cfg).eval()
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.averaged = cfg.MODEL_EMA.ENABLED
    checkpointer.resume_or_load(weights or cfg.MODEL.WEIGHTS, resume=resume)
    return model


def evaluate(cfg, resume: bool = False) -> OrderedDict:
    """Evaluates the weights in MODEL.WEIGHTS on DATASETS.TEST.

    Args:
        cfg: from ``setup_cfg``; see ``load_detector``.
        resume: evaluate the last checkpoint in OUTPUT_DIR instead.

    Raises:
        InputError: weights or data cannot be used, or TEST.AUG is enabled without FCOS.
    """
    model = accelerated(cfg, load_detector(cfg, resume=resume))
    if cfg.TEST.AUG.ENABLED:
        with_tta(cfg, model)  # raises its errors before the plain evaluation, not after it
    folder = Path(cfg.MODEL.WEIGHTS).parent
    is_beside = not resume and Path(cfg.MODEL.WEIGHTS).is_file() and os.access(folder, os.W_OK)
    folder = str(folder) if is_beside else cfg.OUTPUT_DIR
    evaluators = [build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
    results = test(cfg, model, evaluators)
    if cfg.TEST.AUG.ENABLED:
        results.update(test_with_tta(cfg, model))
    return results


def test(cfg, model: nn.Module, evaluators: Sequence[DatasetEvaluator]) -> OrderedDict:
    """Evaluates ``model`` on DATASETS.TEST; returns results by dataset if there are several.

    Shows a progress bar if stderr is a terminal, and a table at the end.
    """
    check_test_sets(cfg)
    results = OrderedDict()
    for name, evaluator in zip(cfg.DATASETS.TEST, evaluators, strict=True):
        loader = build_test_loader(cfg, name)
        hidden = None if comm.is_main_process() else True  # None: unless stderr is a terminal
        on_terminal = ("detectron2", "fcos_d2") if sys.stderr.isatty() else ()
        loggers = list(map(logging.getLogger, on_terminal))
        with logging_redirect_tqdm(loggers), tqdm(loader, name, leave=False, disable=hidden) as bar:
            results[name] = inference_on_dataset(model, bar, evaluator)
        if comm.is_main_process():
            logger.info(f"Evaluation results for {name} in csv format:")
            print_csv_format(results[name])
    if comm.is_main_process() and results:
        logger.info(f"Evaluation results:\n{summary_table(results)}")
    return next(iter(results.values())) if len(results) == 1 else results


def summary_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Formats a row per dataset and task with its AP, and F1 at the best score thresholds."""
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    rows = []
    for name, tasks in results.items():
        f1 = tasks.get("best_f1", {}).get("F1", "")
        for task, values in tasks.items():
            if "AP" in values:
                rows.append([name, task, *(values.get(key, "") for key in columns), f1])
    return tabulate(rows, ["dataset", "task", *columns, "F1"], floatfmt=".1f", tablefmt="pipe")


def with_tta(cfg, model: nn.Module) -> FCOSWithTTA:
    """Adds the test-time augmentation of TEST.AUG to ``model``.

    Raises:
        InputError: ``model`` is not FCOS.
    """
    if not isinstance(model, FCOS):
        raise InputError(
            "TEST.AUG.ENABLED needs MODEL.META_ARCHITECTURE FCOS, "
            f"got {cfg.MODEL.META_ARCHITECTURE}; set TEST.AUG.ENABLED False"
        )
    return FCOSWithTTA(cfg, model)


def check_test_sets(cfg) -> None:
    """Checks that all of DATASETS.TEST have the classes of the model and the training data.

    Raises:
        InputError: a dataset has other classes, or cannot be read.
    """
    check_num_classes(cfg.DATASETS.TEST, fcos_settings(cfg).NUM_CLASSES)
    for name in cfg.DATASETS.TEST:
        check_class_order(cfg.DATASETS.TRAIN, name)


def build_test_loader(cfg, dataset_name: str):
    """Builds detectron2's test loader with FCOSDatasetMapper and validated data."""
    records = load_dataset(dataset_name, filter_empty=False)
    return build_detection_test_loader(
        records,
        mapper=FCOSDatasetMapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_evaluator(cfg, dataset_name: str, weights_folder: str | None = None) -> DatasetEvaluator:
    """Builds the evaluator for the dataset's type (``evaluator_type`` in its metadata).

    For the first dataset, the best score thresholds are measured too, and written to
    ``weights_folder`` (default: OUTPUT_DIR). Not for LVIS, whose images have only some of their
    objects annotated, so that a correct detection may count as wrong.
    """
    evaluator = evaluator_for(dataset_name, f"{cfg.OUTPUT_DIR}/inference/{dataset_name}")
    is_lvis = MetadataCatalog.get(dataset_name).evaluator_type == "lvis"
    if dataset_name != cfg.DATASETS.TEST[0] or is_lvis:
        return evaluator
    thresholds = ThresholdEvaluator(dataset_name, weights_folder or cfg.OUTPUT_DIR)
    return DatasetEvaluators([evaluator, thresholds])


def test_with_tta(cfg, model: nn.Module) -> OrderedDict:
    """Evaluates with test-time augmentation (TEST.AUG); returns the results as ``*_TTA``.

    Detections are saved in ``inference_TTA/<dataset>``.

    Raises:
        InputError: ``model`` is not FCOS.
    """
    augmented = with_tta(cfg, model)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0  # every view is made from the original image
    folder = f"{cfg.OUTPUT_DIR}/inference_TTA"
    evaluators = [evaluator_for(name, f"{folder}/{name}") for name in cfg.DATASETS.TEST]
    results = test(cfg, augmented, evaluators)
    return OrderedDict((f"{key}_TTA", value) for key, value in results.items())
