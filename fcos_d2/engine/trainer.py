"""Trainer: detectron2's DefaultTrainer with the parts that FCOS needs, driven by a YAML config."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from .._compat import ResumableTrainer
from ..checkpoint import Checkpointer
from ..config import fcos_settings
from ..data import FCOSDatasetMapper, check_num_classes, check_objects, load_dataset
from ..errors import InputError
from ..inference import (
    build_detector,
    build_evaluator,
    build_test_loader,
    check_test_sets,
    test_with_tta,
    with_tta,
)
from ..modeling import FCOS
from .distributed import wrap_ddp
from .hooks import (
    CheckpointHook,
    LossWriter,
    TrainingPanels,
    build_ema,
    build_evaluation,
    standard_hooks,
)
from .loader import TrainLoader, sampler_from_config, split_batch
from .setup import flatten, resume_or_load, training_context
from .step import StepTrainer, amp_dtype, batch_norm_errors


class Trainer(ResumableTrainer):
    """DefaultTrainer for FCOS, driven by a config from ``setup_cfg``.

    Its checkpoints hold everything needed to resume training exactly: model, EMA, optimizer,
    schedule, loss scale, position in the data and RNG states of all processes.
    """

    def __init__(self, cfg):
        # Not DefaultTrainer.__init__: it passes device_ids, which DDP refuses for a CPU model.
        TrainerBase.__init__(self)
        cfg = scale_to_processes(cfg)
        amp = cfg.SOLVER.AMP
        model = self.build_model(cfg)
        optimizer, loader = self.build_optimizer(cfg, model), self.build_train_loader(cfg)
        check_batch_norm(cfg, model, loader)
        self._trainer = StepTrainer(
            wrap_ddp(model, broadcast_buffers=False),
            loader,
            optimizer,
            accumulation=cfg.SOLVER.GRADIENT_ACCUMULATION,
            amp_dtype=amp_dtype(amp.PRECISION, cfg.MODEL.DEVICE) if amp.ENABLED else None,
            max_skipped=cfg.SOLVER.MAX_SKIPPED_ITERS,
            settings=flatten({"SOLVER": cfg.SOLVER}),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.ema = build_ema(model, cfg.MODEL_EMA.DECAY if cfg.MODEL_EMA.ENABLED else 0)
        states = {"ema": self.ema} if self.ema else {}
        self.checkpointer = Checkpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **states
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self._last_eval_results: dict = {}
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg, model: nn.Module) -> torch.optim.Optimizer:
        """Builds "SGD" or "ADAMW" (SOLVER.OPTIMIZER) with detectron2's groups; fused on GPUs."""
        solver = cfg.SOLVER
        options = {
            "lr": solver.BASE_LR,
            "weight_decay": solver.WEIGHT_DECAY,
            "fused": True if cfg.MODEL.DEVICE.startswith("cuda") else None,
        }
        if solver.OPTIMIZER == "SGD":
            options |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        elif solver.OPTIMIZER != "ADAMW":
            raise InputError(f"SOLVER.OPTIMIZER must be SGD or ADAMW, got {solver.OPTIMIZER!r}")
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        kind = torch.optim.SGD if solver.OPTIMIZER == "SGD" else torch.optim.AdamW
        return maybe_add_gradient_clipping(cfg, kind)(params, **options)

    @classmethod
    def build_train_loader(cls, cfg):
        """Builds a TrainLoader of validated data, mapped by FCOSDatasetMapper."""
        names, loader = cfg.DATASETS.TRAIN, cfg.DATALOADER
        if not names:
            raise InputError(
                "DATASETS.TRAIN is empty; set it, for example to \"('digits_train',)\""
            )
        records = load_dataset(
            names, filter_empty=loader.FILTER_EMPTY_ANNOTATIONS, masks=cfg.MODEL.MASK_ON
        )
        check_num_classes(names, fcos_settings(cfg).NUM_CLASSES)
        check_objects(records, names)
        per_process = split_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.GRADIENT_ACCUMULATION)
        return TrainLoader(
            records,
            mapper=FCOSDatasetMapper(cfg, is_train=True),
            make_sampler=sampler_from_config(cfg, records),
            total_batch_size=per_process * comm.get_world_size(),
            aspect_ratio_grouping=loader.ASPECT_RATIO_GROUPING,
            num_workers=loader.NUM_WORKERS,
        )

    build_model = staticmethod(build_detector)
    build_test_loader = staticmethod(build_test_loader)
    build_evaluator = staticmethod(build_evaluator)

    def build_hooks(self) -> list[HookBase | None]:
        """Builds DefaultTrainer's hooks and ours."""
        cfg, is_main = self.cfg, comm.is_main_process()
        check_test_sets(cfg)  # before training, not after it
        evaluated = self.ema.module if self.ema else self.checkpointer.model
        panels = is_main and cfg.VIS_PERIOD > 0 and isinstance(self.checkpointer.model, FCOS)
        classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
        self._checkpoints = CheckpointHook(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        evaluations = [self._build_evaluation(cfg.TEST.EVAL_PERIOD, self.test, evaluated)]
        if cfg.TEST.AUG.ENABLED:
            with_tta(cfg, evaluated)  # raises its errors before training, not after it
            # After the last iteration only, as in detectron2's train_net.py: it is slow.
            evaluations.append(self._build_evaluation(0, test_with_tta, evaluated))
        more = [
            TrainingPanels(cfg.VIS_PERIOD, classes) if panels else None,
            self._build_precise_bn(evaluated) if cfg.TEST.PRECISE_BN.ENABLED else None,
        ]
        writer = LossWriter(self.build_writers() if is_main else [], 20, cfg.TEST.EVAL_PERIOD)
        return standard_hooks(self._checkpoints, self.ema, writer, evaluations, more=more)

    def _build_precise_bn(self, model: nn.Module) -> hooks.PreciseBN | None:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        if not get_bn_modules(model):
            return None
        # A separate loader, so that the training loader keeps its position.
        loader = self.build_train_loader(cfg)
        return hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _build_evaluation(self, period: int, test: Callable, model: nn.Module) -> HookBase:
        this = weakref.proxy(self)  # avoids a reference cycle

        def evaluate(model: nn.Module) -> dict:
            results = test(this.cfg, model)
            this._last_eval_results = {**this._last_eval_results, **results}
            return results

        return build_evaluation(period, evaluate, model, self._checkpoints)

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the state as ResumableTrainer does, but keeps this run's learning rate."""
        super().load_state_dict(state_dict)
        groups = self.optimizer.param_groups
        self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, lr in zip(groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = lr

    def resume_or_load(self, resume: bool = True) -> None:
        """See DefaultTrainer."""
        weights = self.cfg.MODEL.WEIGHTS
        self.start_iter = resume_or_load(self, self.checkpointer, weights, resume)

    def train(self):
        """Trains; SIGTERM saves and stops, and input errors are reported in one line."""
        with training_context(self._checkpoints):
            return super().train()


def check_batch_norm(cfg, model: nn.Module, loader: TrainLoader) -> None:
    """Refuses batches of one image if the smallest would give batch norm a 1x1 feature map.

    Runs the model on the meta device, with the smallest image at the smallest training size.
    """
    is_single = isinstance(loader, TrainLoader) and loader.batch_size == 1
    records = loader.dataset if is_single else ()
    sides = {(r["height"], r["width"]) for r in records if {"height", "width"} <= r.keys()}
    if not sides or not get_bn_modules(model.train()):
        return
    short, long = min(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    if short:
        sides = {ResizeShortestEdge.get_output_shape(*pair, short, long) for pair in sides}
    divisor = model.backbone.size_divisibility or 1
    padded = [-(-side // divisor) * divisor for side in min(sides, key=max)]
    image = torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), *padded, device="meta")
    model = copy.deepcopy(model).to("meta")
    with batch_norm_errors(), contextlib.suppress(RuntimeError):  # an op without meta kernel
        features = model.backbone(image)
        if isinstance(model, FCOS):
            model.head([features[name] for name in model.head_in_features])


def scale_to_processes(cfg):
    """Scales ``cfg`` from SOLVER.REFERENCE_WORLD_SIZE to the number of processes; see docs."""
    reference, images = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference and images % reference:
        raise InputError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} does not divide SOLVER.IMS_PER_BATCH "
            f"{images}; set it to the number of processes that the schedule was made for"
        )
    return ResumableTrainer.auto_scale_workers(cfg, comm.get_world_size())
