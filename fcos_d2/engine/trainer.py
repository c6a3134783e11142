"""Trainer: detectron2's DefaultTrainer with the parts that FCOS needs, driven by a YAML config."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import weakref
from collections.abc import Iterator

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .._compat import ResumableTrainer
from ..checkpoint import Checkpointer
from ..config import fcos_settings
from ..data import FCOSDatasetMapper, check_num_classes, load_dataset
from ..errors import InputError
from ..inference import (
    build_detector,
    build_evaluator,
    build_test_loader,
    test_with_tta,
    with_tta,
)
from ..modeling import FCOS
from .distributed import distribute
from .hooks import (
    AssignmentStatistics,
    CheckpointHook,
    EvaluationHook,
    TrainingPanels,
    WeightAveraging,
)
from .loader import TrainLoader, sampler_from_config
from .step import StepTrainer, usable_precision

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Trainer(ResumableTrainer):
    """DefaultTrainer for FCOS, driven by a config of ``setup_cfg``.

    Its checkpoints hold all that decides how training goes on: model, average of the model,
    optimizer, schedule, loss scale, position in the data and random numbers of all processes.
    """

    def __init__(self, cfg):
        # Not DefaultTrainer's, which takes a step, a way to distribute and a checkpointer for given
        # that know neither the CPU nor how to continue.
        TrainerBase.__init__(self)
        cfg = scale_to_processes(cfg)
        precision = cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = StepTrainer(
            distribute(model, broadcast_buffers=False),
            self.build_train_loader(cfg),
            optimizer,
            accumulation=cfg.SOLVER.GRADIENT_ACCUMULATION,
            amp_dtype=usable_precision(precision, cfg.MODEL.DEVICE),
            max_skipped=cfg.SOLVER.MAX_SKIPPED_ITERS,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.averaged = averaged_model(model, cfg.MODEL_EMA.DECAY if cfg.MODEL_EMA.ENABLED else 0)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
            **({"ema": self.averaged} if self.averaged else {}),
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

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
        """A TrainLoader of checked data, by FCOSDatasetMapper."""
        names = cfg.DATASETS.TRAIN
        if not names:
            raise InputError(
                "DATASETS.TRAIN is empty; set it, for example to \"('digits_train',)\""
            )
        records = load_dataset(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            masks=cfg.MODEL.MASK_ON,
        )
        check_num_classes(names, fcos_settings(cfg).NUM_CLASSES)
        return TrainLoader(
            records,
            mapper=FCOSDatasetMapper(cfg, is_train=True),
            make_sampler=sampler_from_config(cfg, records),
            total_batch_size=batch_size(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GRADIENT_ACCUMULATION),
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        """See ``fcos_d2.inference.build_detector``."""
        return build_detector(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        """See ``fcos_d2.inference.build_test_loader``."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> DatasetEvaluator:
        """See ``fcos_d2.inference.build_evaluator``."""
        return build_evaluator(cfg, dataset_name)

    def build_hooks(self) -> list[HookBase | None]:
        """DefaultTrainer's, with ours before the writers."""
        cfg, is_main = self.cfg, comm.is_main_process()
        self._checkpoints = CheckpointHook(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        is_fcos = isinstance(self.checkpointer.model, FCOS)
        evaluated = self.averaged.module if self.averaged else self.checkpointer.model
        return [
            hooks.IterationTimer(),  # first, so that it times the step alone
            AssignmentStatistics() if is_main else None,
            self._build_panels() if is_main and cfg.VIS_PERIOD > 0 and is_fcos else None,
            hooks.LRScheduler(),
            self._build_precise_bn(evaluated) if cfg.TEST.PRECISE_BN.ENABLED else None,
            # Before checkpoints, which are to have its result.
            WeightAveraging(self.averaged, self.checkpointer) if self.averaged else None,
            # Before the evaluation, so that there is something to look at if that fails.
            self._checkpoints,
            EvaluationHook(cfg.TEST.EVAL_PERIOD, self._evaluator(), evaluated, self._checkpoints),
            self._build_augmented_test(evaluated) if cfg.TEST.AUG.ENABLED else None,
            hooks.PeriodicWriter(self.build_writers(), period=20) if is_main else None,
        ]

    def _build_panels(self) -> TrainingPanels:
        metadata = MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0])
        return TrainingPanels(self.cfg.VIS_PERIOD, metadata.get("thing_classes"))

    def _build_precise_bn(self, model: nn.Module) -> hooks.PreciseBN | None:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        if not get_bn_modules(model):
            return None
        # Its loader is another one, so that the training's goes on undisturbed.
        loader = self.build_train_loader(cfg)
        return hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _evaluator(self):
        this = weakref.proxy(self)  # a hook must not own its trainer

        def evaluate(model: nn.Module) -> dict:
            this._last_eval_results = this.test(this.cfg, model)
            return this._last_eval_results

        return evaluate

    def _build_augmented_test(self, model: nn.Module) -> EvaluationHook:
        """After the last iteration alone, as in detectron2's train_net.py: it takes long."""
        with_tta(self.cfg, model)  # refuses what it cannot do before the training, not after it
        this = weakref.proxy(self)

        def evaluate(model: nn.Module) -> dict:
            results = test_with_tta(this.cfg, model)
            this._last_eval_results.update(results)
            return results

        return EvaluationHook(0, evaluate, model, self._checkpoints)

    def resume_or_load(self, resume: bool = True) -> None:
        """DefaultTrainer's; only weights that start a training may have other classes."""
        checkpointer = self.checkpointer
        resume = resume and checkpointer.has_checkpoint()
        checkpointer.reset_class_layer = not resume
        super().resume_or_load(resume=resume)
        if resume and comm.is_main_process():
            forget_metrics(f"{self.cfg.OUTPUT_DIR}/metrics.json", self.start_iter)

    def train(self):
        """DefaultTrainer's; SIGTERM saves and stops, and a user's error is told in one line."""
        with training_errors(), self._checkpoints.listening():
            try:
                return super().train()
            finally:
                self._trainer.close()


def averaged_model(model: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of ``model``, which starts at its first update.

    Statistics of BN are averaged as well: those of the last weights would not fit.

    Args:
        model: the detector.
        decay: share of the average that an update keeps, in (0, 1); 0 for no average at all.

    Raises:
        InputError: another decay.
    """
    if not 0 <= decay < 1:
        raise InputError(f"MODEL_EMA.DECAY must be in (0, 1), got {decay}; 0.999 is common")
    if not decay:
        return None
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return averaged.requires_grad_(False)


def scale_to_processes(cfg):
    """``cfg`` for as many processes as there are, by SOLVER.REFERENCE_WORLD_SIZE; see docs.

    Raises:
        InputError: a batch that the reference cannot divide.
    """
    reference, images = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference and images % reference:
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} does not divide SOLVER.IMS_PER_BATCH "
            f"{images}; set it to the number of processes that the schedule was made for"
        )
    return ResumableTrainer.auto_scale_workers(cfg, comm.get_world_size())


def batch_size(images: int, accumulation: int) -> int:
    """Images of all processes per batch, if a step of ``images`` takes ``accumulation`` batches.

    Raises:
        InputError: it cannot be divided so.
    """
    processes = comm.get_world_size()
    if accumulation < 1 or images < 1 or images % (accumulation * processes):
        raise InputError(
            f"{images} images (SOLVER.IMS_PER_BATCH) cannot be divided by {processes} (processes) "
            f"x {accumulation} (SOLVER.GRADIENT_ACCUMULATION); make it a multiple of "
            f"{max(accumulation, 1) * processes}"
        )
    return images // accumulation


def forget_metrics(path: str, first: int) -> None:
    """Cuts off what a training that resumes at iteration ``first`` will write again."""
    if not os.path.isfile(path):
        return
    with open(path, "r+b") as file:
        while line := file.readline():
            if not _is_before(line, first):
                file.seek(-len(line), os.SEEK_CUR)
                file.truncate()
                return


def _is_before(line: bytes, first: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < first
    except ValueError:  # it was cut off
        return False


@contextlib.contextmanager
def training_errors() -> Iterator[None]:
    """Keeps InputErrors out of the log, and makes one of a full disk.

    detectron2's loop logs the traceback of whatever ends it; for these, ``run_script`` prints the
    line that matters.
    """

    def is_bug(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, InputError) or _is_full_disk(error))

    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(is_bug)
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise InputError(
            f"cannot write {error.filename or 'to the output folder'}: {error.strerror}; make room "
            "or set OUTPUT_DIR, and continue with --resume"
        ) from error
    finally:
        loop.removeFilter(is_bug)


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS
