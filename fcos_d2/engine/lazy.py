"""The same as Trainer for LazyConfig files: detectron2's tools/lazyconfig_train_net.py in short."""

from __future__ import annotations

import logging

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..errors import InputError
from .checkpoint import Checkpointer
from .hooks import AssignmentStatistics
from .setup import check_config_file
from .trainer import training_errors

logger = logging.getLogger(__name__)


def is_lazy(args) -> bool:
    """Whether ``args.config_file`` is a LazyConfig instead of a YAML file."""
    return args.config_file.endswith(".py")


def run_lazy(args) -> dict | None:
    """Trains or (``--eval-only``) evaluates what a LazyConfig file describes.

    The file has the keys of detectron2's lazyconfig_train_net: model, optimizer, lr_multiplier,
    dataloader and train; ``args.opts`` are overrides like ``train.max_iter=100``.
    """
    cfg = _load_lazy(args)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="fcos_d2")
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"no GPU found: train.device {cfg.train.device} becomes cpu")
        cfg.train.device, cfg.train.amp.enabled = "cpu", False
    model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        Checkpointer(model).load(cfg.train.init_checkpoint)
        return _test_lazy(cfg, model)
    cfg.optimizer.params.model = model
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(
        model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer)
    )
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(_lazy_hooks(cfg, model, checkpointer))
    resuming = args.resume and checkpointer.has_checkpoint()
    checkpointer.reset_class_layer = not resuming
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    with training_errors():
        trainer.train(trainer.iter + 1 if resuming else 0, cfg.train.max_iter)
    return None


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


def _lazy_hooks(cfg, model: nn.Module, checkpointer: Checkpointer) -> list[HookBase | None]:
    train, is_main = cfg.train, comm.is_main_process()
    writers = default_writers(train.output_dir, train.max_iter) if is_main else []
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        AssignmentStatistics() if is_main else None,
        hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer) if is_main else None,
        hooks.EvalHook(train.eval_period, lambda: _test_lazy(cfg, model)),
        hooks.PeriodicWriter(writers, period=train.log_period) if is_main else None,
    ]


def _test_lazy(cfg, model: nn.Module) -> dict:
    loader, evaluator = (instantiate(cfg.dataloader[key]) for key in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results
