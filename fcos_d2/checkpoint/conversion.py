"""Converts the weights of other FCOS implementations, and back: dict -> dict, without a model.

formats.py holds what is specific to an implementation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import CONVENTIONS
from ..errors import InputError, format_value
from .adjustments import CLASS_LAYER, IMPORTING, Weights, count_classes, is_scale, select_classes
from .formats import FORMATS, CheckpointFormat, Names
from .requirements import Requirements

# Where checkpoints keep the weights, averaged ones first, which published results come from.
# mmengine's ema_state_dict is not listed: it swaps the two when it saves.
WRAPPERS = ("model_ema", "state_dict_ema", "ema", "model", "state_dict", "model_state", "blobs")
# Prefixes of DistributedDataParallel, torch.compile and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Tensors that are not weights of a detector.
NO_WEIGHTS = re.compile(r"pixel_(mean|std)|((rpn\.)?anchor_generator|data_preprocessor)\..*")

OURS = "fcos_d2"
PREDICTIONS = {f"{CLASS_LAYER}weight", "head.ctrness.weight"}  # in all weights of a detector
MOST_REPEATED = 2**26  # elements of a tensor that are not in its file
WRITABLE = tuple(known.name for known in FORMATS if known.exporting is not None)
# How boxes and qualities are predicted, which other implementations cannot change.
BOX_KEYS = (
    *("USE_RELU", "NORM_REG_TARGETS", "CENTERNESS_ON_REG"),
    *("LOCATION_OFFSET", "LOCATION_PITCH"),
)


class Recognized(NamedTuple):
    """A checkpoint of another implementation.

    Attributes:
        format: name of its CheckpointFormat.
        weights: by the names of this package's model. Tensors unknown to the format keep their
            names.
        requirements: what the weights require of the config.
    """

    format: str
    weights: Weights
    requirements: Requirements


def extract_weights(checkpoint: Mapping) -> tuple[Weights, dict]:
    """Removes wrappers around the weights and prefixes of their names.

    Returns:
        The weights, and everything else in the checkpoint.

    Raises:
        InputError: the checkpoint contains no dict of tensors or arrays.
    """
    rest: dict = {}
    found = _find_weights(checkpoint, rest) if isinstance(checkpoint, Mapping) else None
    if found is None:
        got = type(checkpoint).__name__
        if isinstance(checkpoint, Mapping):
            got = f"a dict of {', '.join(map(format_value, list(checkpoint)[:5])) or 'nothing'}"
        raise InputError(
            f"expected weights by name, alone or under {', '.join(WRAPPERS)}, got {got}; "
            "save them with torch.save(model.state_dict(), FILE)"
        )
    weights = {k: _to_tensor(k, v) for k, v in found.items() if isinstance(k, str) and _is_array(v)}
    weights.pop("n_averaged", None)  # torch's AveragedModel
    for prefix in PREFIXES * 2:  # they nest
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return {key: value for key, value in weights.items() if not NO_WEIGHTS.fullmatch(key)}, rest


def _find_weights(mapping: Mapping, rest: dict) -> Mapping | None:
    """The innermost dict of tensors; its siblings go into ``rest``."""
    for key in WRAPPERS:
        inner = mapping.get(key)
        found = _find_weights(inner, rest) if isinstance(inner, Mapping) else None
        if found is not None:
            rest.update({name: value for name, value in mapping.items() if name != key})
            return found
    return mapping if any(map(_is_array, mapping.values())) else None


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
    )


def _to_tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    """A plain tensor of real numbers."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    is_dense = value.layout == torch.strided and not (value.is_quantized or value.is_nested)
    is_plain = is_dense and not (value.is_meta or value.is_complex())
    if not is_plain or value.numel() > max(MOST_REPEATED, value.untyped_storage().nbytes()):
        raise InputError(
            f"tensor {format_value(name)} is sparse, quantized, nested, complex, without numbers "
            "or a few numbers repeated many times; save plain arrays: "
            "torch.save({k: v.contiguous() for k, v in model.state_dict().items()}, FILE)"
        )
    return value


def recognize(weights: Collection[str]) -> CheckpointFormat | None:
    """The format with these names; None if they belong to no known FCOS, or to this package."""
    for known in FORMATS:
        if {rename(key, known.modules) for key in weights} >= PREDICTIONS:
            return known
    return None


def is_ours(weights: Collection[str]) -> bool:
    """Whether the names are those of this package's detector."""
    return set(weights) >= PREDICTIONS


def rename(key: str, modules: Names) -> str | None:
    """Renames ``key`` by the entry for its longest prefix; None if there is none."""
    module = key
    while "." in module:
        module = module.rpartition(".")[0]
        if module in modules:
            return modules[module] + key.removeprefix(module)
    return None


def import_weights(checkpoint: Mapping, num_classes: int | None = None) -> Recognized | None:
    """Converts a checkpoint of any known format to this package's weights.

    Args:
        checkpoint: as it was saved, including wrappers.
        num_classes: K of the model that will use the weights, if known. It decides whether
            torchvision's rows for unused category ids are dropped.

    Returns:
        None if no format matches: weights of this package, of a backbone only, or of another model.

    Raises:
        InputError: the checkpoint contains no dict of tensors.
    """
    theirs, rest = extract_weights(checkpoint)
    known = recognize(theirs)
    if known is None:
        return None
    weights = {rename(key, known.modules) or key: value for key, value in theirs.items()}
    if weights[f"{CLASS_LAYER}weight"].dim() == 0:
        raise InputError("the layer that predicts classes has no row per class; save it anew")
    for adjust in (*known.importing, *IMPORTING):
        weights = adjust(weights)
    weights = {
        key: value.reshape(-1) if is_scale(key) else value
        for key, value in weights.items()
        if not key.endswith(".num_batches_tracked")
    }
    if known.has_unused_classes:
        weights = select_classes(weights, num_classes)
    conventions, settings = known.requirements(weights, rest)
    settings = {**settings, "MODEL.FCOS.NUM_CLASSES": count_classes(weights)}
    return Recognized(known.name, weights, Requirements(conventions, settings))


def export_weights(
    weights: Weights, name: str, requirements: Requirements | None = None
) -> Weights:
    """Converts this package's weights to those of another format.

    Args:
        weights: by the names of this package's model.
        name: one of ``WRITABLE``.
        requirements: what the weights are known to require.

    Raises:
        InputError: the format cannot be written, or cannot represent these weights exactly.
    """
    known = next((known for known in FORMATS if known.name == name), None)
    if known is None or known.exporting is None:
        raise InputError(f"weights cannot be written as {name}; choose {', '.join(WRITABLE)}")
    if requirements:
        _check_same_boxes(requirements, name)
    # The moving normalizer belongs to the training run, not to the detector.
    weights = {key: value for key, value in weights.items() if not key.startswith("losses.")}
    for adjust in known.exporting:
        weights = adjust(weights)
    # If two modules map to one of ours, the first is the current one.
    modules = {ours: theirs for theirs, ours in reversed(known.modules.items())}
    renamed = {key: rename(key, modules) for key in weights}
    homeless = [key for key, new in renamed.items() if new is None]
    if homeless:
        raise InputError(
            f"{name} has no place for {', '.join(homeless[:3])}"
            + (f" and {len(homeless) - 3} more" if len(homeless) > 3 else "")
            + "; no format but adelaidet holds every variant of the head"
        )
    return {renamed[key]: value for key, value in weights.items()}


def _check_same_boxes(required: Requirements, name: str) -> None:
    """Refuses weights that no option of the other implementation could reproduce."""
    theirs = CONVENTIONS[name]
    settings = {key.removeprefix("MODEL.FCOS."): value for key, value in required.settings.items()}
    choices = [{**CONVENTIONS[convention], **settings} for convention in required.conventions]
    different = [[key for key in BOX_KEYS if ours[key] != theirs[key]] for ours in choices]
    if all(different):
        key = different[0][0]
        raise InputError(
            f"{name} predicts otherwise: it has {key} {theirs[key]}, and these weights need "
            f"{choices[0][key]}; they cannot be written for it"
        )


def adapt_weights(weights: Weights, names: Collection[str]) -> Weights:
    """Fits weights to a model with tensors of these ``names`` without changing any result.

    Level scales of 1 are added or dropped, and counters of batches are dropped.
    """

    def is_needed(key: str) -> bool:
        is_one = is_scale(key) and bool((weights[key] == 1).all())
        return key in names or not (is_one or key.endswith(".num_batches_tracked"))

    adapted = {key: value for key, value in weights.items() if is_needed(key)}
    if is_ours(weights) and not any(map(is_scale, weights)):
        adapted |= {name: torch.ones(1) for name in names if is_scale(name)}
    return adapted
