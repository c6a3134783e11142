"""Trainer: detectron2's DefaultTrainer with the parts that FCOS needs, driven by a YAML config."""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections.abc import Iterator

import torch
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import HookBase
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from .._compat import ResumableTrainer
from ..data import FCOSDatasetMapper, check_num_classes, load_dataset, prepare
from ..errors import InputError, one_line_cause
from .checkpoint import Checkpointer
from .hooks import AssignmentStatistics, TrainingPanels


class Trainer(ResumableTrainer):
    """DefaultTrainer for FCOS, driven by a config of ``setup_cfg``."""

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        """DefaultTrainer's, for which wrong values in ``cfg`` are the user's error."""
        try:
            return super().build_model(cfg)
        except ValueError as error:
            if str(error).startswith("FCOS"):
                raise InputError(one_line_cause(error)) from error
            raise

    @classmethod
    def build_optimizer(cls, cfg, model: nn.Module) -> torch.optim.Optimizer:
        """SOLVER.OPTIMIZER "SGD" or "ADAMW", both with detectron2's parameter groups."""
        solver = cfg.SOLVER
        if solver.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        if solver.OPTIMIZER != "ADAMW":
            raise InputError(f"SOLVER.OPTIMIZER must be SGD or ADAMW, got {solver.OPTIMIZER!r}")
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)

    @classmethod
    def build_train_loader(cls, cfg):
        """DefaultTrainer's, with FCOSDatasetMapper and checked data."""
        names = cfg.DATASETS.TRAIN
        if not names:
            raise InputError(
                "DATASETS.TRAIN is empty; set it, for example to \"('digits_train',)\""
            )
        records = load_dataset(names, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        check_num_classes(names, cfg.MODEL.FCOS.NUM_CLASSES)
        return build_detection_train_loader(
            cfg, dataset=records, mapper=FCOSDatasetMapper(cfg, is_train=True)
        )

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        """DefaultTrainer's, with FCOSDatasetMapper and checked data."""
        records = load_dataset(dataset_name, filter_empty=False)
        check_num_classes(dataset_name, cfg.MODEL.FCOS.NUM_CLASSES)
        return build_detection_test_loader(
            records,
            mapper=FCOSDatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of the data set's type (``evaluator_type`` in its metadata)."""
        return evaluator_for(dataset_name, f"{cfg.OUTPUT_DIR}/inference")

    def build_hooks(self) -> list[HookBase]:
        """DefaultTrainer's, with ours before the writers."""
        # Here, because DefaultTrainer makes its checkpointer and then hands it to its hooks.
        self.checkpointer = Checkpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        default = super().build_hooks()
        ours: list[HookBase] = []
        if comm.is_main_process():
            ours.append(AssignmentStatistics())
            if self.cfg.VIS_PERIOD > 0:
                metadata = MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0])
                names = metadata.get("thing_classes")
                ours.append(TrainingPanels(self.cfg.VIS_PERIOD, names))
        return [default[0], *ours, *default[1:]]  # after IterationTimer, which times the step alone

    def resume_or_load(self, resume: bool = True) -> None:
        """DefaultTrainer's; only weights that start a training may have other classes."""
        checkpointer = self.checkpointer
        checkpointer.reset_class_layer = not (resume and checkpointer.has_checkpoint())
        super().resume_or_load(resume=resume)

    def train(self):
        """DefaultTrainer's, with a loss that is not finite told in one line."""
        with training_errors():
            return super().train()


def evaluator_for(dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """The evaluator that the metadata of ``dataset_name`` asks for.

    Raises:
        InputError: it asks for none, or for one that does not fit boxes.
    """
    prepare(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "coco":
        # The fast implementation is compiled code that many builds of detectron2 lack.
        return COCOEvaluator(
            dataset_name, tasks=("bbox",), output_dir=output_dir, use_fast_impl=False
        )
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    raise InputError(
        f"data set {dataset_name!r} has evaluator_type {kind!r}, which is none of coco, pascal_voc "
        f"and lvis; set MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco' where you "
        "register it"
    )


@contextlib.contextmanager
def training_errors() -> Iterator[None]:
    """Makes an InputError of a loss that is not finite, and keeps InputErrors out of the log.

    detectron2's loop logs the traceback of whatever ends it; for these, ``run_script`` prints the
    line that matters.
    """

    def is_bug(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (FloatingPointError, InputError))

    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(is_bug)
    try:
        yield
    except FloatingPointError as error:
        raise InputError(_describe_nan(error)) from error
    finally:
        loop.removeFilter(is_bug)


def _describe_nan(error: FloatingPointError) -> str:
    # numpy 2 prints its numbers as np.float64(nan)
    message = re.sub(r"np\.float\d+\(([^)]*)\)", r"\1", one_line_cause(error))
    return (
        f"{message.rstrip('.')}; try a lower SOLVER.BASE_LR, more SOLVER.WARMUP_ITERS or "
        "SOLVER.CLIP_GRADIENTS.ENABLED True"
    )
