"""Trains and evaluates from LazyConfig files, like detectron2's tools/lazyconfig_train_net.py."""

from __future__ import annotations

import logging
from functools import partial

import torch
from detectron2.config import instantiate
from detectron2.engine import default_setup, default_writers
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..checkpoint import Checkpointer
from ..config_file import check_config_file, check_opts
from ..lazy_config import load_lazy
from .distributed import wrap_ddp
from .hooks import CheckpointHook, LossWriter, build_ema, build_evaluation, standard_hooks
from .loader import split_batch
from .setup import flatten, resume_or_load, training_context
from .step import StepTrainer, amp_dtype

logger = logging.getLogger(__name__)


def run_lazy(args) -> dict | None:
    """Trains or (``--eval-only``) evaluates the model of a LazyConfig file.

    The file has the keys of detectron2's lazyconfig_train_net: model, optimizer, lr_multiplier,
    dataloader and train; ``args.opts`` are overrides like ``train.max_iter=100``. Additional keys
    and their defaults: ``train.amp.precision="float16"``, ``train.gradient_accumulation=1``,
    ``train.max_skipped_iters=0`` and ``train.model_ema=dict(enabled=False, decay=0.999)``;
    config.py documents them.
    """
    cfg = _load(args)
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
        return _test(cfg, model)
    _train(cfg, model, build_ema(model, ema.get("decay", 0.999) if ema["enabled"] else 0), args)
    return None


def _load(args) -> DictConfig:
    check_config_file(args.config_file)
    check_opts(args.opts)
    return load_lazy(args.config_file, args.opts or [])


def _build_trainer(cfg: DictConfig, model: nn.Module) -> StepTrainer:
    train, loader = cfg.train, cfg.dataloader.train
    accumulation = train.get("gradient_accumulation", 1)
    per_process = split_batch(loader.total_batch_size, accumulation)
    loader.total_batch_size = per_process * comm.get_world_size()
    tree = OmegaConf.to_container(cfg)
    settings = flatten({key: tree[key] for key in ("optimizer", "lr_multiplier")})
    cfg.optimizer.params.model = model
    precision = train.amp.get("precision", "float16")
    return StepTrainer(
        wrap_ddp(model, **train.ddp),
        instantiate(loader),
        instantiate(cfg.optimizer),
        accumulation=accumulation,
        amp_dtype=amp_dtype(precision, train.device) if train.amp.enabled else None,
        max_skipped=train.get("max_skipped_iters", 0),
        settings={**settings, "train.max_iter": str(train.max_iter)},
    )


def _train(cfg: DictConfig, model: nn.Module, ema: AveragedModel | None, args) -> None:
    train, trainer = cfg.train, _build_trainer(cfg, model)
    states = {"ema": ema} if ema else {}
    checkpointer = Checkpointer(model, train.output_dir, trainer=trainer, **states)
    checkpoints = CheckpointHook(checkpointer, **train.checkpointer)
    evaluated = ema.module if ema else model
    evaluation = build_evaluation(train.eval_period, partial(_test, cfg), evaluated, checkpoints)
    is_main = comm.is_main_process()
    writers = default_writers(train.output_dir, train.max_iter) if is_main else []
    writer = LossWriter(writers, train.log_period, train.eval_period)
    scheduler = instantiate(cfg.lr_multiplier)
    trainer.register_hooks(
        standard_hooks(checkpoints, ema, writer, [evaluation], scheduler=scheduler)
    )
    first = resume_or_load(trainer, checkpointer, train.init_checkpoint, args.resume)
    with training_context(checkpoints):
        trainer.train(first, train.max_iter)


def _test(cfg: DictConfig, model: nn.Module) -> dict:
    loader, evaluator = (instantiate(cfg.dataloader[key]) for key in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results
