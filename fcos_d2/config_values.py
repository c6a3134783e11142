"""Checks the values of detectron2's config keys, which would otherwise fail late in a run."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY
from PIL import Image

from .errors import InputError, suggest
from .modeling.backbone import ADELAIDET_NAMES

_NORMS = ("", "BN", "FrozenBN", "GN", "LN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
CHOICES = {
    "INPUT.FORMAT": ("BGR", "YUV-BT.601", *Image.MODES),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.FPN.NORM": _NORMS,
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": _NORMS,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}  # fmt: skip
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
}
# Minimum value, which holds for each number in a tuple.
AT_LEAST = {
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TEST": 0,
    "INPUT.MIN_SIZE_TRAIN": 1,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "SOLVER.BASE_LR": 0,
    "SOLVER.GAMMA": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.STEPS": 0,
    "SOLVER.WARMUP_FACTOR": 0,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "TEST.EVAL_PERIOD": 0,
    "VIS_PERIOD": 0,
}


def check_values(cfg: CfgNode) -> None:
    """Checks choices and ranges that detectron2 does not check.

    Raises:
        InputError: a name is not registered, a value is not among the choices or out of range, or
            values do not fit together.
    """
    choices = {key: list(names) for key, names in CHOICES.items()}
    choices |= {key: [name for name, _ in registry] for key, registry in REGISTRIES.items()}
    choices["MODEL.BACKBONE.NAME"] += ADELAIDET_NAMES
    choices["MODEL.PROPOSAL_GENERATOR.NAME"].append("PrecomputedProposals")
    if cfg.MODEL.LAZY_CONFIG:  # names its model by class
        del choices["MODEL.META_ARCHITECTURE"]
    value_of = {key: reduce(getattr, key.split("."), cfg) for key in (*choices, *AT_LEAST)}
    for key, known in choices.items():
        value = value_of[key]
        if value not in known:
            advice = suggest(str(value), map(str, known), f"for example {known[0]!r}")
            names = ", ".join(map(repr, known))
            raise InputError(f"{key} must be one of {names}, got {value!r}; {advice}")
    for key, low in AT_LEAST.items():
        value = value_of[key]
        if not np.all(np.greater_equal(value, low)):
            raise InputError(f"{key} must be at least {low}, got {value}; raise it")
    steps, mean, std = cfg.SOLVER.STEPS, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if list(steps) != sorted(steps):
        raise InputError(f"SOLVER.STEPS must increase, got {steps}; sort them")
    if len(mean) != len(std) or not all(number > 0 for number in std):
        raise InputError(
            f"MODEL.PIXEL_STD must be a positive number for each of the {len(mean)} channels of "
            f"MODEL.PIXEL_MEAN, got {std}; correct one of them"
        )
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise InputError(
            f"MODEL.DEVICE must be a torch device, got {cfg.MODEL.DEVICE!r}; set it to cpu, "
            "cuda or cuda:1"
        ) from error
