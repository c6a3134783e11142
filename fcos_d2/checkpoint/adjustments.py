"""Adjusts renamed weights where implementations differ in more than names.

Each function takes a state dict and returns one that yields the same detections.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import InputError

Weights = dict[str, Tensor]

CLASS_LAYER = "head.cls_logits."
# Background, and category ids that COCO does not use; torchvision's class layer has rows for them.
COCO_GAPS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
NEVER = -1e4  # logit of a class that is never detected


def count_classes(weights: Weights) -> int:
    """Returns the number of classes K of renamed weights."""
    return len(weights[f"{CLASS_LAYER}weight"])


def is_scale(key: str) -> bool:
    """Returns whether ``key`` names the scale of a level."""
    return re.fullmatch(r"head\.scales\.\d+\.scale", key) is not None


# ---- Importing ----


def subtract_epsilon(weights: Weights) -> Weights:
    """Subtracts 1e-5 from the variance of frozen batch norms, to which tianzhi0549/FCOS adds none.

    Its BatchNorm2d layers, recognizable by ``num_batches_tracked``, do add it.
    """
    adjusted = dict(weights)
    for key, value in weights.items():
        counter = key.replace("running_var", "num_batches_tracked")
        if key.endswith(".running_var") and counter not in weights:
            adjusted[key] = (value.double() - 1e-5).to(value.dtype)
    return adjusted


def drop_unused_projections(weights: Weights) -> Weights:
    """Drops the projections that AdelaiDet's nested DLA trees define but never use."""
    suffix = ".tree1.tree1.conv1.weight"
    unused = tuple(f"{k.removesuffix(suffix)}.project." for k in weights if k.endswith(suffix))
    return {key: value for key, value in weights.items() if not key.startswith(unused)}


def nest_deformable_convs(weights: Weights) -> Weights:
    """Moves mmdetection's deformable convolutions into the module that predicts their offsets."""
    deformable = {key.rpartition(".offset.")[0] for key in weights if ".offset." in key}
    return {
        f"{module}.conv.{leaf}" if module in deformable else key: value
        for key, value in weights.items()
        for module, _, leaf in (key.rpartition("."),)
    }


def rename_paddle_leaves(weights: Weights) -> Weights:
    """Renames the tensors inside PaddleDetection's modules."""
    leaves = {"_mean": "running_mean", "_variance": "running_var", "scale_reg": "scale"}
    return {
        f"{module}.{leaves.get(leaf, leaf)}": value
        for key, value in weights.items()
        for module, _, leaf in (key.rpartition("."),)
    }


def add_zero_biases(weights: Weights) -> Weights:
    """Adds zero biases to tower convolutions that have none."""
    added = {}
    for key, value in weights.items():
        bias = key.removesuffix("weight") + "bias"
        if re.fullmatch(r"head\.\w+_tower\..*weight", key) and value.dim() == 4:
            added[bias] = weights.get(bias, value.new_zeros(len(value)))
    return {**weights, **added}


def copy_norms_to_levels(weights: Weights) -> Weights:
    """Copies batch norms that levels share, fully or in part, to every level."""
    levels = range(_count_levels(weights))
    copied: Weights = {}
    for key, value in weights.items():
        match = re.fullmatch(r"(head\.\w+_tower\.\d+)\.(\w+)", key)
        statistics = (f"{match[1]}.running_var", f"{match[1]}.0.running_var") if match else ()
        if any(name in weights for name in statistics):
            copied |= {f"{match[1]}.{level}.{match[2]}": value for level in levels}
        else:
            copied[key] = value
    return copied


def select_classes(weights: Weights, wanted: int | None) -> Weights:
    """Drops rows of torchvision's class layer that no class uses; ``wanted`` is the model's K."""
    count = count_classes(weights)
    rows = list(range(1 if wanted == count - 1 else 0, count))  # 0 is background
    if count == 91 != wanted:
        rows = [row for row in rows if row not in COCO_GAPS]
    return weights | {
        key: value[rows]
        for key, value in weights.items()
        if key.startswith(CLASS_LAYER) and value.shape[:1] == (count,)
    }


# Applied to every format; weights that already match stay unchanged.
IMPORTING = (drop_unused_projections, nest_deformable_convs, rename_paddle_leaves)
IMPORTING += (add_zero_biases, copy_norms_to_levels)

# ---- Exporting ----


def add_scales(weights: Weights) -> Weights:
    """Adds level scales of 1 to weights that have none."""
    if any(map(is_scale, weights)):
        return weights
    levels = range(_count_levels(weights))
    return {**weights, **{f"head.scales.{level}.scale": torch.ones(1) for level in levels}}


def fold_scales(weights: Weights) -> Weights:
    """Folds a scale that all levels share into the box prediction."""
    scales = [float(value) for key, value in weights.items() if is_scale(key)]
    if len(set(scales)) > 1:
        raise InputError(
            "detectron2 and torchvision have one box prediction for all levels, but head.scales "
            f"are {', '.join(f'{scale:.4g}' for scale in scales)}, which they cannot express; "
            "write the weights as adelaidet, or train with MODEL.FCOS.USE_SCALE False"
        )
    folded = {key: value for key, value in weights.items() if not is_scale(key)}
    for key in ("head.bbox_pred.weight", "head.bbox_pred.bias"):
        if key in folded and scales:
            folded[key] = folded[key] * scales[0]
    return folded


def merge_norms_of_levels(weights: Weights) -> Weights:
    """Reverses ``copy_norms_to_levels`` for weight and bias, which detectron2's levels share."""
    own = re.compile(r"(head\.\w+_tower\.\d+)\.\d+\.(weight|bias)")
    merged: Weights = {}
    for key, value in weights.items():
        match = own.fullmatch(key)
        name = f"{match[1]}.{match[2]}" if match else key
        if not torch.equal(merged.setdefault(name, value), value):
            raise InputError(
                f"detectron2's levels share the {match[2]} of a batch norm, but those of "
                f"{match[1]} differ, which it cannot express; write the weights as adelaidet"
            )
    return merged


def check_group_norms(weights: Weights) -> Weights:
    """Refuses weights with batch norms in the head, which torchvision does not support."""
    if any(re.fullmatch(r"head\.\w+_tower\..*running_var", key) for key in weights):
        raise InputError(
            "torchvision's FCOS has group norms in its head and these weights have batch norms; "
            "write them as adelaidet or detectron2"
        )
    return weights


def add_unused_classes(weights: Weights) -> Weights:
    """Pads 80 classes to 91 by COCO's category ids, any other K to K + 1 (0 is background)."""
    classes = count_classes(weights)
    gaps = COCO_GAPS if classes == 80 else (0,)
    rows = [row for row in range(classes + len(gaps)) if row not in gaps]
    padded = dict(weights)
    for key in (key for key in weights if key.startswith(CLASS_LAYER)):
        old = weights[key]
        filler = NEVER if key.endswith("bias") else 0.0
        padded[key] = old.new_full((classes + len(gaps), *old.shape[1:]), filler)
        padded[key][rows] = old
    return padded


def _count_levels(weights: Weights) -> int:
    scales = sum(map(is_scale, weights))
    outputs = r"backbone\.(fpn_output|top_block\.p)\d+\.weight"
    return scales or sum(bool(re.fullmatch(outputs, key)) for key in weights)
