"""Argument checks of the public op wrappers.

Every message names the function, the argument, what was expected, what was given, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .levels import Levels

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(value: object) -> str:
    """``float32 Tensor[3, 4] on cpu`` for a tensor, type and value for anything else."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} Tensor{list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check(condition: bool, function: str, expected: str, got: object, remedy: str = "") -> None:
    """Raises ValueError ``function: expected, got ...; remedy`` unless ``condition``."""
    if not condition:
        got = got if isinstance(got, str) else describe(got)
        raise ValueError(f"{function}: {expected}, got {got}" + (f"; {remedy}" if remedy else ""))


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
    good = isinstance(value, Tensor) and value.dtype in dtypes and value.dim() == len(shape)
    good = good and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
    )
    check(good, function, expected, value, remedy)


def check_same_device(function: str, **tensors: Tensor) -> None:
    """Checks that all tensors live on the device of the first."""
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
    """Checks one floating-point [B, channels, H, W] tensor per level, alike in all but H and W.

    Where ``like`` is given, ``maps`` must match it in number, batch, height, width, device.
    """
    good = isinstance(maps, (list, tuple)) and len(maps) > 0
    check(good, function, f"{name} must be a non-empty list of Tensor[B, {channels}, H, W]", maps)
    for tensor in maps:
        check_tensor(function, f"{name}[l]", tensor, ["B", channels, "H", "W"], FLOATING)
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
        check(
            sizes == wanted,
            function,
            f"{name} must have (batch, height, width) {wanted} per level",
            str(sizes),
        )
        check_same_device(function, first_level=like[0], **{name: maps[0]})


def check_levels(function: str, levels: object, maps: Sequence[Tensor] = ()) -> None:
    """Checks ``levels`` and, where given, that ``maps`` have the heights and widths it states."""
    check(isinstance(levels, Levels), function, "levels must be fcos_d2.ops.Levels", levels)
    check(
        len(levels.shapes) == len(levels.strides) == len(levels.pitches),
        function,
        "levels must have as many shapes as strides and pitches",
        str(levels),
        "build it with fcos_d2.ops.make_levels",
    )
    if maps:
        shapes = [tuple(t.shape[2:]) for t in maps]
        check(
            shapes == [tuple(shape) for shape in levels.shapes],
            function,
            f"levels.shapes must be those of the maps {shapes}",
            str(levels.shapes),
        )


def check_choice(function: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Checks that ``value`` is one of ``choices``."""
    expected = f"{name} must be one of {', '.join(choices)}"
    check(value in choices, function, expected, describe(value))


def check_number(function: str, name: str, value: object, low: float, high: float) -> None:
    """Checks that ``value`` is a number in [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    check(good, function, f"{name} must be a number in [{low}, {high}]", describe(value))
