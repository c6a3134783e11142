"""The same as Trainer for LazyConfig files: detectron2's tools/lazyconfig_train_net.py in short."""

from __future__ import annotations

import logging

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..checkpoint.checkpointer import Checkpointer
from ..config_file import check_config_file
from ..errors import InputError
from .distributed import distribute
from .hooks import AssignmentStatistics, CheckpointHook, EvaluationHook, WeightAveraging
from .step import StepTrainer, usable_precision
from .trainer import averaged_model, batch_size, forget_metrics, training_errors

logger = logging.getLogger(__name__)


def is_lazy(args) -> bool:
    """Whether ``args.config_file`` is a LazyConfig instead of a YAML file."""
    return args.config_file.endswith(".py")


def run_lazy(args) -> dict | None:
    """Trains or (``--eval-only``) evaluates what a LazyConfig file describes.

    The file has the keys of detectron2's lazyconfig_train_net: model, optimizer, lr_multiplier,
    dataloader and train; ``args.opts`` are overrides like ``train.max_iter=100``. Keys that only
    this function knows, with their defaults: ``train.amp.precision="float16"``,
    ``train.gradient_accumulation=1``, ``train.max_skipped_iters=0`` and
    ``train.model_ema=dict(enabled=False, decay=0.999)``; config.py explains them.
    """
    cfg = _load_lazy(args)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="fcos_d2")
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"no GPU found: train.device {cfg.train.device} becomes cpu")
        cfg.train.device = "cpu"
    model = instantiate(cfg.model).to(cfg.train.device)
    ema = OmegaConf.select(cfg, "train.model_ema") or {"enabled": False}
    if args.eval_only:
        checkpointer = Checkpointer(model, cfg.train.output_dir)
        checkpointer.averaged = ema["enabled"]
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        return _test_lazy(cfg, model)
    trainer = _lazy_trainer(cfg, model)
    averaged = averaged_model(model, ema.get("decay", 0.999) if ema["enabled"] else 0)
    states = {"ema": averaged} if averaged else {}
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer, **states)
    checkpoints = CheckpointHook(checkpointer, **cfg.train.checkpointer)
    trainer.register_hooks(_lazy_hooks(cfg, checkpoints, averaged))
    resuming = args.resume and checkpointer.has_checkpoint()
    checkpointer.reset_class_layer = not resuming
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    first = trainer.iter + 1 if resuming else 0
    if resuming and comm.is_main_process():
        forget_metrics(f"{cfg.train.output_dir}/metrics.json", first)
    with training_errors(), checkpoints.listening():
        trainer.train(first, cfg.train.max_iter)
    return None


def _lazy_trainer(cfg, model: nn.Module) -> StepTrainer:
    train, loader = cfg.train, cfg.dataloader.train
    accumulation = train.get("gradient_accumulation", 1)
    loader.total_batch_size = batch_size(loader.total_batch_size, accumulation)
    cfg.optimizer.params.model = model
    return StepTrainer(
        distribute(model, **train.ddp),
        instantiate(loader),
        instantiate(cfg.optimizer),
        accumulation=accumulation,
        amp_dtype=usable_precision(
            train.amp.get("precision", "float16") if train.amp.enabled else None, train.device
        ),
        max_skipped=train.get("max_skipped_iters", 0),
    )


def _load_lazy(args):
    path = args.config_file
    check_config_file(path)
    try:
        cfg = LazyConfig.apply_overrides(LazyConfig.load(path), args.opts or [])
    except SyntaxError as error:
        cause = error.__cause__ or error  # detectron2 wraps the one that knows the line
        raise InputError(f"{path} line {cause.lineno}: {cause.msg}; correct the Python") from error
    missing = {"model", "optimizer", "lr_multiplier", "dataloader", "train"} - set(cfg)
    if missing:
        raise InputError(
            f"config file {path} does not define {', '.join(sorted(missing))}; start from a file "
            "in configs/lazy"
        )
    return cfg


def _lazy_hooks(
    cfg, checkpoints: CheckpointHook, averaged: AveragedModel | None
) -> list[HookBase | None]:
    train, is_main = cfg.train, comm.is_main_process()
    writers = default_writers(train.output_dir, train.max_iter) if is_main else []
    model = averaged.module if averaged else checkpoints.checkpointer.model
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        AssignmentStatistics() if is_main else None,
        WeightAveraging(averaged, checkpoints.checkpointer) if averaged else None,
        checkpoints,
        EvaluationHook(train.eval_period, lambda model: _test_lazy(cfg, model), model, checkpoints),
        hooks.PeriodicWriter(writers, period=train.log_period) if is_main else None,
    ]


def _test_lazy(cfg, model: nn.Module) -> dict:
    loader, evaluator = (instantiate(cfg.dataloader[key]) for key in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results
