"""Checkpoints of every other FCOS as weights of this one, and back: dict -> dict, no model needed.

What is particular to an implementation stands in ``fcos_d2.checkpoint.formats``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import CONVENTIONS
from ..errors import InputError, format_value
from .formats import CLASS_LAYER, LAYOUTS, Layout, Needs, Weights, count_classes, is_scale

# Where checkpoints keep the weights, averaged ones first: published results are theirs. What
# mmengine calls ema_state_dict is not in the list: it swaps the two when it saves.
WRAPPERS = ("model_ema", "state_dict_ema", "ema", "model", "state_dict", "model_state")
# Put before every name by DistributedDataParallel, torch.compile and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")

OURS = "fcos_d2"
MOST_WRAPPERS = 50  # dicts that are looked through for weights
MOST_REPEATED = 2**26  # numbers of a tensor that its file does not hold
# Layouts in which weights can also be written.
WRITABLE = tuple(layout.name for layout in LAYOUTS if layout.writing is not None)
# What makes boxes and qualities of predictions, and is no option elsewhere.
BOX_KEYS = (
    "USE_RELU",
    "NORM_REG_TARGETS",
    "CENTERNESS_ON_REG",
    "LOCATION_OFFSET",
    "LOCATION_PITCH",
)


class Recognised(NamedTuple):
    """A checkpoint of another implementation.

    Attributes:
        layout: name of its Layout.
        weights: by the names of this package's model; a tensor that the layout does not know keeps
            its own name.
        needs: what it expects of the config.
    """

    layout: str
    weights: Weights
    needs: Needs


def unwrap(checkpoint: Mapping) -> tuple[Weights, dict]:
    """A checkpoint -> (its weights without what wrappers put around them, whatever else it holds).

    Raises:
        InputError: there is no dict of tensors in it.
    """
    rest: dict = {}
    is_dict = isinstance(checkpoint, Mapping)
    found = _find_state(checkpoint, rest) if is_dict else None
    if found is None:
        keys = ", ".join(map(format_value, list(checkpoint)[:5])) if is_dict else ""
        raise InputError(
            f"expected weights by name, alone or under {', '.join(WRAPPERS)}, got "
            + (f"a dict of {keys or 'nothing'}" if is_dict else type(checkpoint).__name__)
            + "; save them with torch.save(model.state_dict(), FILE)"
        )
    weights = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    weights.pop("n_averaged", None)  # torch's AveragedModel
    for key, value in weights.items():
        _check_plain(key, value)
    return _strip_prefixes(weights), rest


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that is no plain array of real numbers."""
    is_dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
    kind = None
    if not is_dense or tensor.is_meta or tensor.is_complex():
        kind = "sparse, quantized, nested, complex or without numbers"
    elif tensor.numel() > max(MOST_REPEATED, tensor.untyped_storage().nbytes()):
        kind = f"a few numbers, repeated {tensor.numel()} times"
    if kind:
        raise InputError(
            f"tensor {format_value(name)} is {kind}; save plain arrays: "
            "torch.save({k: v.contiguous() for k, v in model.state_dict().items()}, FILE)"
        )


def _find_state(mapping: Mapping, rest: dict, seen: set[int] | None = None) -> Mapping | None:
    """The innermost dict of tensors; what lies beside it goes into ``rest``."""
    seen = set() if seen is None else seen
    if id(mapping) in seen or len(seen) > MOST_WRAPPERS:
        return None
    seen.add(id(mapping))
    for key in WRAPPERS:
        inner = mapping.get(key)
        found = _find_state(inner, rest, seen) if isinstance(inner, Mapping) else None
        if found is not None:
            rest.update({name: value for name, value in mapping.items() if name != key})
            return found
    return mapping if any(isinstance(value, Tensor) for value in mapping.values()) else None


def _strip_prefixes(weights: Weights) -> Weights:
    for prefix in PREFIXES * 2:  # they nest
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def recognise(weights: Collection[str]) -> Layout | None:
    """The layout that these names are of; None if of no known FCOS, or of this package."""
    for layout in LAYOUTS:
        if any(all(key in weights for key in marker) for marker in layout.markers):
            return layout
    return None


def is_ours(weights: Collection[str]) -> bool:
    """Whether these names are those of this package's detector."""
    return f"{CLASS_LAYER}weight" in weights and "head.ctrness.weight" in weights


def read(checkpoint: Mapping, num_classes: int | None = None) -> Recognised | None:
    """Reads a checkpoint of any known layout.

    Args:
        checkpoint: as it was saved, wrappers included.
        num_classes: K of the model that the weights are for, if it is known. It decides what
            becomes of torchvision's rows for classes that do not exist.

    Returns:
        None if no layout fits: weights of this package, of a backbone alone, or of something else.

    Raises:
        InputError: there is no dict of tensors in it.
    """
    theirs, rest = unwrap(checkpoint)
    layout = recognise(theirs)
    if layout is None:
        return None
    rename = Renaming(layout.modules)
    weights = {
        rename(key) or key: value
        for key, value in theirs.items()
        if not re.search(layout.ignored, key)
    }
    _check_class_layer(weights)
    for change in layout.reading:
        weights = change(weights)
    if layout.class_rows:
        weights = _select_classes(weights, layout.class_rows, num_classes)
    needs = layout.needs(weights, rest)
    settings = {**needs.settings, "MODEL.FCOS.NUM_CLASSES": count_classes(weights)}
    return Recognised(layout.name, weights, Needs(needs.conventions, settings))


def write(weights: Weights, name: str, needs: Needs | None = None) -> Weights:
    """This package's weights -> those of the layout ``name``.

    Args:
        weights: by the names of this package's model.
        name: one of ``WRITABLE``.
        needs: what is known about how the weights must be used.

    Raises:
        InputError: that layout cannot be written, or cannot hold these weights exactly.
    """
    layout = next((layout for layout in LAYOUTS if layout.name == name), None)
    if layout is None or layout.writing is None:
        raise InputError(f"weights cannot be written as {name}; choose {', '.join(WRITABLE)}")
    if needs:
        _check_same_boxes(needs, layout.needs(weights, {}), name)
    # The moving average of the positives belongs to the training, not to the detector.
    weights = {key: value for key, value in weights.items() if not key.startswith("losses.")}
    for change in layout.writing:
        weights = change(weights)
    rename = Renaming((ours, theirs) for theirs, ours in layout.modules)
    written = {rename(key): value for key, value in weights.items()}
    homeless = [key for key in weights if rename(key) is None]
    if homeless:
        raise InputError(
            f"{name} has no place for {', '.join(homeless[:3])}"
            + (f" and {len(homeless) - 3} more" if len(homeless) > 3 else "")
            + "; no layout but adelaidet holds every variant of the head"
        )
    return written


def _check_same_boxes(needs: Needs, theirs: Needs, name: str) -> None:
    """Refuses what no option of the other implementation could make up for."""
    (their,) = _box_settings(theirs)
    ours = _box_settings(needs)
    if their not in ours:
        key = next(key for key in BOX_KEYS if ours[0][key] != their[key])
        raise InputError(
            f"{name} predicts otherwise: it has {key} {their[key]}, and these weights need "
            f"{ours[0][key]}; they cannot be written for it"
        )


def _box_settings(needs: Needs) -> list[dict[str, object]]:
    """Values of BOX_KEYS in each convention that the weights may follow."""
    return [
        {key: needs.settings.get(f"MODEL.FCOS.{key}", CONVENTIONS[name][key]) for key in BOX_KEYS}
        for name in needs.conventions
    ]


def fit(weights: Weights, names: Collection[str]) -> Weights:
    """Changes of ``weights`` that leave every result as it is and make them fit a model.

    A factor per level that is 1 is added or left out; counters of batches are left out.

    Args:
        weights: by the names of this package's model.
        names: of the model's parameters and buffers.
    """
    fitted = {
        key: value
        for key, value in weights.items()
        if key in names
        or not (
            key.endswith(".num_batches_tracked") or (is_scale(key) and bool((value == 1).all()))
        )
    }
    if is_ours(weights) and not any(map(is_scale, weights)):
        fitted |= {name: torch.ones(1) for name in names if is_scale(name)}
    return fitted


def _check_class_layer(weights: Weights) -> None:
    weight = weights[f"{CLASS_LAYER}weight"]
    if weight.dim() == 0:
        raise InputError("the layer that predicts classes has no row per class; save it anew")


def _select_classes(weights: Weights, rule: Callable, num_classes: int | None) -> Weights:
    count = count_classes(weights)
    rows = rule(count, num_classes)
    layer = {
        key: value[rows]
        for key, value in weights.items()
        if key.startswith(CLASS_LAYER) and value.shape[:1] == (count,)
    }
    return {**weights, **layer}


class Renaming:
    """Renames a key by the first row of a table that fits it."""

    SLOT = re.compile(r"\{(?:(\d+)\*)?(\w+)(?:\+(\d+))?\}|\*\*")

    def __init__(self, rows: Iterable[tuple[str, str]]):
        self._rows = [(*self._compile(source), target) for source, target in rows]

    def __call__(self, key: str) -> str | None:
        """The new name of ``key``; None if no row fits."""
        module, _, leaf = key.rpartition(".")
        for pattern, slots, target in self._rows:
            match = pattern.fullmatch(module)
            values = match and self._solve(slots, match.groups())
            if values is not None:
                return f"{self._fill(target, values)}.{leaf}"
        return None

    def _compile(self, template: str) -> tuple[re.Pattern, list[tuple[str, int, int]]]:
        slots, pattern, end = [], "", 0
        for slot in self.SLOT.finditer(template):
            factor, name, shift = slot.groups()
            slots.append((name or "**", int(factor or 1), int(shift or 0)))
            pattern += re.escape(template[end : slot.start()]) + (r"(\d{1,9})" if name else "(.+)")
            end = slot.end()
        return re.compile(pattern + re.escape(template[end:])), slots

    @staticmethod
    def _solve(slots: list, texts: Sequence[str]) -> dict[str, object] | None:
        values: dict[str, object] = {}
        for (name, factor, shift), text in zip(slots, texts, strict=True):
            value: object = text
            if name != "**":
                value, remainder = divmod(int(text) - shift, factor)
                if remainder or value < 0:
                    return None
            if values.setdefault(name, value) != value:
                return None
        return values

    def _fill(self, template: str, values: Mapping[str, object]) -> str:
        def text(slot: re.Match) -> str:
            factor, name, shift = slot.groups()
            value = values[name or "**"]
            return str(value * int(factor or 1) + int(shift or 0)) if name else str(value)

        return self.SLOT.sub(text, template)
