"""Argument checks of the public op wrappers.

Every message names the function, the argument, what was expected, what was given, and the remedy.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .levels import Levels

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_LENGTH = 300  # characters of a quoted value
MAX_POINTS = 2**31 - 1  # per level: kernels index points with 32 bits, everything else with 64


def describe(value: object) -> str:
    """Returns ``float32 Tensor[3, 4] on cpu`` for a tensor, type and value for anything else."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if not is_dense(value):
            return f"{dtype} Tensor that is sparse, nested or quantized"
        return f"{dtype} Tensor{list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {format_value(value)}"


def format_value(value: object) -> str:
    """Returns ``repr(value)``, shortened."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # Python does not format integers of more than 4300 digits
        return "of thousands of digits"
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."


def is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor is strided and neither nested nor quantized."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized)


def is_int64(value: object) -> bool:
    """Returns whether ``value`` is a 64-bit integer, or a symbolic one of torch.compile."""
    return isinstance(value, (int, torch.SymInt)) and -(2**63) <= value < 2**63


def is_number(value: object, low: float, high: float) -> bool:
    """Returns whether ``value`` is a float or a 64-bit integer in [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    return good and (isinstance(value, float) or abs(value) < 2**63)


def check(condition: bool, function: str, expected: str, got: object, remedy: str = "") -> None:
    """Raises ValueError ``function: expected, got ...; remedy`` unless ``condition``."""
    if not condition:
        remedy = f"; {remedy}" if remedy else ""
        raise ValueError(f"{function}: {expected}, got {describe(got)}{remedy}")


def check_tensor(
    function: str,
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    remedy: str = "",
) -> None:
    """Checks type, dtype and shape; a string in ``shape`` names a free dimension."""
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    expected = f"{name} must be {names} Tensor[{', '.join(map(str, shape))}]"
    good = isinstance(value, Tensor) and value.dtype in dtypes and is_dense(value)
    good = good and value.dim() == len(shape)
    good = good and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
    )
    check(good, function, expected, value, remedy)


def check_same_device(function: str, **tensors: Tensor) -> None:
    """Checks that all tensors are on the same device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        check(
            tensor.device == first.device,
            function,
            f"{name} must be on {first.device} like {first_name}",
            tensor,
            f"move it with .to({first_name}.device)",
        )


def check_maps(
    function: str, name: str, maps: object, channels: int | str, like: Sequence[Tensor] = ()
) -> None:
    """Checks that ``maps`` are floating-point [B, channels, H, W] tensors, alike except for H, W.

    If ``like`` is given, ``maps`` must have its number of levels, batch size, H, W and device.
    """
    good = isinstance(maps, (list, tuple)) and len(maps) > 0
    check(good, function, f"{name} must be a non-empty list of Tensor[B, {channels}, H, W]", maps)
    for tensor in maps:
        check_tensor(function, f"{name}[l]", tensor, ["B", channels, "H", "W"], FLOATING)
        points = tensor.shape[2] * tensor.shape[3]
        expected = f"{name}[l] must have at most {MAX_POINTS} points and at most as many channels"
        good = points <= MAX_POINTS and tensor.shape[1] <= MAX_POINTS
        check(good, function, expected, tensor)
        check(
            tensor.shape[:2] == maps[0].shape[:2]
            and tensor.dtype == maps[0].dtype
            and tensor.device == maps[0].device,
            function,
            f"{name}: all levels must agree in batch, channels, dtype and device "
            f"({describe(maps[0])})",
            tensor,
        )
    if like:
        sizes, wanted = [[(t.shape[0], *t.shape[2:]) for t in side] for side in (maps, like)]
        if sizes != wanted:
            expected = f"{name} must have (batch, height, width) {format_value(wanted)} per level"
            check(False, function, expected, sizes)
        check_same_device(function, first_level=like[0], **{name: maps[0]})


def check_levels(function: str, levels: object, maps: Sequence[Tensor] = ()) -> None:
    """Checks ``levels`` and, if ``maps`` are given, that their heights and widths match."""
    remedy = "build it with fcos_d2.ops.make_levels"
    check(isinstance(levels, Levels), function, "levels must be fcos_d2.ops.Levels", levels, remedy)
    check(
        all(isinstance(field, (tuple, list)) for field in levels[:3])
        and len(levels.shapes) == len(levels.strides) == len(levels.pitches),
        function,
        "levels must have as many shapes as strides and pitches",
        levels,
        remedy,
    )
    for name, pairs in (("shapes", levels.shapes), ("pitches", levels.pitches)):
        good = all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_int64, pair))
            for pair in pairs
        )
        check(good, function, f"levels.{name} must be pairs of integers", pairs, remedy)
    for stride in levels.strides:
        check_count(function, "levels.strides[l]", stride)
    check_number(function, "levels.offset", levels.offset, 0, 1)
    for height, width in levels.shapes:
        expected = f"levels.shapes must be sizes of at most {MAX_POINTS} points"
        good = height >= 0 and width >= 0 and height * width <= MAX_POINTS
        check(good, function, expected, (height, width))
    if maps:
        shapes = [tuple(t.shape[2:]) for t in maps]
        if shapes != [tuple(shape) for shape in levels.shapes]:
            expected = f"levels.shapes must be those of the maps {format_value(shapes)}"
            check(False, function, expected, levels.shapes)


def check_choice(function: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Checks that ``value`` is one of ``choices``."""
    expected = f"{name} must be one of {', '.join(choices)}"
    check(isinstance(value, str) and value in choices, function, expected, value)


def check_number(function: str, name: str, value: object, low: float, high: float) -> None:
    """Checks that ``value`` is a number in [low, high]."""
    good = is_number(value, low, high)
    check(good, function, f"{name} must be a number in [{low}, {high}]", value)


def check_positive(function: str, name: str, value: object) -> None:
    """Checks that ``value`` is a finite number above 0."""
    good = is_number(value, 0, math.inf) and 0 < value < math.inf
    check(good, function, f"{name} must be > 0 and finite", value)


def check_count(function: str, name: str, value: object) -> None:
    """Checks that ``value`` is a positive 32-bit integer."""
    good = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
    check(good, function, f"{name} must be an integer >= 1 and < 2^31", value)


def check_pixel_extent(function: str, value: object) -> None:
    """Checks that ``value`` is 0 or 1."""
    good = isinstance(value, int) and not isinstance(value, bool) and value in (0, 1)
    check(good, function, "pixel_extent must be 0 or 1", value)


def check_flags(function: str, **flags: object) -> None:
    """Checks that all ``flags`` are True or False."""
    for name, value in flags.items():
        check(isinstance(value, bool), function, f"{name} must be True or False", value)
