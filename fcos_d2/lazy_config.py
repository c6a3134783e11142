"""Reads LazyConfig files and converts them to CfgNodes."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode, LazyConfig, get_cfg
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from .config import add_fcos_config, resolve_convention
from .errors import InputError, one_line_cause

SECTIONS = {"model", "optimizer", "lr_multiplier", "dataloader", "train"}
_MAPPER = "dataloader.{}.mapper.augmentations[0]."
# Config keys that inference needs, and their paths in a LazyConfig.
KEYS = {
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.FCOS.NUM_CLASSES": "model.head.num_classes",
    "MODEL.FCOS.POST_NMS_TOPK_TEST": "model.postprocess.max_detections",
    "MODEL_EMA.ENABLED": "train.model_ema.enabled",
    "INPUT.FORMAT": "model.input_format",
    "INPUT.MIN_SIZE_TRAIN": f"{_MAPPER.format('train')}short_edge_length",
    "INPUT.MAX_SIZE_TRAIN": f"{_MAPPER.format('train')}max_size",
    "INPUT.MIN_SIZE_TEST": f"{_MAPPER.format('test')}short_edge_length",
    "INPUT.MAX_SIZE_TEST": f"{_MAPPER.format('test')}max_size",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATALOADER.NUM_WORKERS": "dataloader.test.num_workers",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "OUTPUT_DIR": "train.output_dir",
}
LISTS = ("INPUT.MIN_SIZE_TRAIN", "DATASETS.TRAIN", "DATASETS.TEST")


def is_lazy(path: str) -> bool:
    """Returns whether a config file is a LazyConfig instead of YAML."""
    return path.endswith(".py")


def load_lazy(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Loads a LazyConfig that has all ``SECTIONS``.

    Args:
        path: an existing file.
        overrides: assignments such as ``train.max_iter=100``.

    Raises:
        InputError: the file is not Python or lacks a section, or an override is invalid.
    """
    try:
        cfg = LazyConfig.apply_overrides(LazyConfig.load(path), list(overrides))
    except SyntaxError as error:
        cause = error.__cause__ or error  # detectron2 wraps the error that has the line
        raise InputError(f"{path} line {cause.lineno}: {cause.msg}; correct the Python") from error
    except HydraException as error:
        raise InputError(f"invalid override of {path}: {one_line_cause(error)}") from error
    missing = SECTIONS - set(cfg)
    if missing:
        raise InputError(
            f"config file {path} does not define {', '.join(sorted(missing))}; start from a file "
            "in configs/lazy"
        )
    return cfg


def cfg_from_lazy(path: str, opts: Sequence[str]) -> CfgNode:
    """Builds a CfgNode from a LazyConfig, for all commands except training.

    Args:
        path: an existing file.
        opts: overrides of the LazyConfig (``train.device=cpu``), and KEY VALUE pairs that override
            the CfgNode (``MODEL.INFERENCE.DTYPE auto``).

    Raises:
        InputError: see ``load_lazy``.
    """
    overrides = [word for word in opts if "=" in word]
    lazy = load_lazy(path, overrides)
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = getattr(lazy.model["_target_"], "__name__", "")
    cfg.MODEL.LAZY_CONFIG = [path, *overrides]
    for key, place in KEYS.items():
        value = OmegaConf.select(lazy, place)
        if value is not None:
            many = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            cfg.merge_from_list([key, tuple(many) if key in LISTS else value])
    cfg.merge_from_list([word for word in opts if "=" not in word])
    return resolve_convention(cfg)
