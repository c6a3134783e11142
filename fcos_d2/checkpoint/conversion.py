"""Converts weights from and to other FCOS implementations: dict -> dict, without a model.

formats.py holds everything specific to one implementation.
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

# Keys of the weights in checkpoints; averaged weights first, as published results come from them.
# Without ema_state_dict: mmengine swaps it with state_dict when it saves.
WRAPPERS = ("model_ema", "state_dict_ema", "ema", "model", "state_dict", "model_state", "blobs")
# Prefixes added by DistributedDataParallel, torch.compile and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Tensors that are not weights of a detector.
NO_WEIGHTS = re.compile(r"pixel_(mean|std)|((rpn\.)?anchor_generator|data_preprocessor)\..*")

OURS = "fcos_d2"
PREDICTIONS = {f"{CLASS_LAYER}weight", "head.ctrness.weight"}  # in every detector's weights
MOST_REPEATED = 2**26  # elements that a tensor with repeated values may have
WRITABLE = tuple(known.name for known in FORMATS if known.exporting is not None)
# Settings of box and quality prediction that other implementations cannot change.
BOX_KEYS = (
    *("USE_RELU", "NORM_REG_TARGETS", "CENTERNESS_ON_REG"),
    *("LOCATION_OFFSET", "LOCATION_PITCH"),
)


class Recognized(NamedTuple):
    """A checkpoint of another implementation.

    Attributes:
        format: name of its CheckpointFormat.
        weights: keyed by this package's names; tensors unknown to the format keep theirs.
        requirements: what the weights require of the config.
    """

    format: str
    weights: Weights
    requirements: Requirements


def extract_weights(checkpoint: Mapping) -> tuple[Weights, dict]:
    """Unwraps the weights in a checkpoint and strips prefixes from their names.

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
    for prefix in PREFIXES * 2:  # they may be nested
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return {key: value for key, value in weights.items() if not NO_WEIGHTS.fullmatch(key)}, rest


def _find_weights(mapping: Mapping, rest: dict) -> Mapping | None:
    """Returns the innermost dict of tensors, and collects its siblings in ``rest``."""
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
    """Converts ``value`` to a plain tensor of real numbers."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    is_dense = value.layout == torch.strided and not (value.is_quantized or value.is_nested)
    is_plain = is_dense and not (value.is_meta or value.is_complex())
    if not is_plain or value.numel() > max(MOST_REPEATED, value.untyped_storage().nbytes()):
        raise InputError(
            f"tensor {format_value(name)} is sparse, quantized, nested, complex, on the meta "
            "device, or expanded from a few values; save plain tensors: "
            "torch.save({k: v.contiguous() for k, v in model.state_dict().items()}, FILE)"
        )
    return value


def recognize(weights: Collection[str]) -> CheckpointFormat | None:
    """Returns the format with these names; None for this package's and for unknown names."""
    for known in FORMATS:
        if {rename(key, known.modules) for key in weights} >= PREDICTIONS:
            return known
    return None


def is_ours(weights: Collection[str]) -> bool:
    """Returns whether the names are those of this package's detector."""
    return set(weights) >= PREDICTIONS


def rename(key: str, modules: Names) -> str | None:
    """Renames ``key`` by its longest prefix in ``modules``; returns None if there is none."""
    module = key
    while "." in module:
        module = module.rpartition(".")[0]
        if module in modules:
            return modules[module] + key.removeprefix(module)
    return None


def import_weights(checkpoint: Mapping, num_classes: int | None = None) -> Recognized | None:
    """Converts a checkpoint of any known format to this package's weights.

    Args:
        checkpoint: as saved, including wrappers.
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
        raise InputError("the class layer is a scalar, not a row per class; save it again")
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
        weights: keyed by this package's names.
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
    # If two of their modules map to one of ours, the first has the current name.
    modules = {ours: theirs for theirs, ours in reversed(known.modules.items())}
    renamed = {key: rename(key, modules) for key in weights}
    unmapped = [key for key, new in renamed.items() if new is None]
    if unmapped:
        raise InputError(
            f"{name} has no place for {', '.join(unmapped[:3])}"
            + (f" and {len(unmapped) - 3} more" if len(unmapped) > 3 else "")
            + "; only adelaidet holds every variant of the head"
        )
    return {renamed[key]: value for key, value in weights.items()}


def _check_same_boxes(required: Requirements, name: str) -> None:
    """Refuses weights whose boxes the other implementation cannot reproduce with any option."""
    theirs = CONVENTIONS[name]
    settings = {key.removeprefix("MODEL.FCOS."): value for key, value in required.settings.items()}
    choices = [{**CONVENTIONS[convention], **settings} for convention in required.conventions]
    different = [[key for key in BOX_KEYS if ours[key] != theirs[key]] for ours in choices]
    if all(different):
        key = different[0][0]
        raise InputError(
            f"{name} decodes boxes differently: it has {key} {theirs[key]}, but these weights need "
            f"{choices[0][key]}; they cannot be written for it"
        )


def adapt_weights(weights: Weights, names: Collection[str]) -> Weights:
    """Adapts weights to a model whose tensors have these ``names`` without changing any result.

    Adds or drops level scales of 1, and drops unused ``num_batches_tracked``.
    """

    def is_needed(key: str) -> bool:
        is_one = is_scale(key) and bool((weights[key] == 1).all())
        return key in names or not (is_one or key.endswith(".num_batches_tracked"))

    adapted = {key: value for key, value in weights.items() if is_needed(key)}
    if is_ours(weights) and not any(map(is_scale, weights)):
        adapted |= {name: torch.ones(1) for name in names if is_scale(name)}
    return adapted
