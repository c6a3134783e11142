"""Declares the ops to torch and loads the compiled kernels.

Every op is declared once, in Python, with its reference as the implementation for all devices
(``CompositeExplicitAutograd``). A compiled library adds kernels for ``CPU`` and ``CUDA``, which the
dispatcher prefers; nothing else in the package knows which of the two runs.

If the library for a device is not built, the first op on that device emits a warning, once per
process. With ``FCOS_D2_STRICT=1`` in the environment, every such op raises an error instead.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

NAMESPACE = "fcos_d2"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_FOLDER = Path(__file__).parents[1]  # of the compiled libraries


class Definition(NamedTuple):
    """The definition of an op; see ``define_op`` and ``define_autograd``."""

    schema: str
    reference: Callable
    fake: Callable
    backward: Callable | None = None
    setup_context: Callable | None = None


OPS: dict[str, Definition] = {}

_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}  # by device type
_HOW_TO_BUILD = (
    "in the source directory of fcos_d2 with: {}pip install -e . "
    "(or: {}python setup.py build_ext --inplace)"
)
_loaded: set[str] = set()
_has_warned = False
_warning_lock = threading.Lock()


def define_op(schema: str, reference: Callable, fake: Callable) -> Callable:
    """Declares ``schema`` with its reference implementation and its fake (shape-only) kernel.

    Returns:
        The overload to call, ``torch.ops.fcos_d2.<name>.default``.
    """
    name = schema.split("(", 1)[0]
    OPS[name] = Definition(schema, reference, fake)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _reporting(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the derivative of op ``name`` (see ``torch.library.register_autograd``)."""
    OPS[name] = OPS[name]._replace(backward=backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def forbid_double_backward(name: str) -> None:
    """Makes differentiating the gradient op ``name`` an error instead of a silent zero."""

    def backward(ctx, *grads):
        raise _no_second_derivative(name)

    define_autograd(name, backward, setup_context=lambda ctx, inputs, output: None)


def without_second_derivative(name: str, gradient: list[torch.Tensor], inputs: tuple) -> tuple:
    """Returns ``gradient``, computed by op ``name`` from ``inputs``; differentiating it raises."""
    return _WithoutSecondDerivative.apply(name, gradient, *inputs)


class _WithoutSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, gradient, *inputs):
        ctx.name = name
        return tuple(gradient)

    @staticmethod
    def backward(ctx, *grads):
        raise _no_second_derivative(ctx.name)


def _no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"fcos_d2::{name} has no second derivative; call backward() without create_graph=True"
    )


def _reporting(name: str, reference: Callable) -> Callable:
    """Wraps ``reference`` to report that it runs because a library is not built."""

    @functools.wraps(reference)
    def wrapper(*args):
        _report_reference(name, _device_type(args))
        return reference(*args)

    return wrapper


def _device_type(args: tuple) -> str:
    """Returns the device type of the first tensor in ``args`` or in a list among them."""
    values = (value for arg in args for value in (arg if isinstance(arg, list) else [arg]))
    return next(value.device.type for value in values if isinstance(value, torch.Tensor))


def _report_reference(name: str, device_type: str) -> None:
    global _has_warned
    library = _LIBRARIES.get(device_type)
    can_be_built = library is not None and (device_type != "cuda" or torch.version.cuda is not None)
    if not can_be_built or library in _loaded:
        return
    variable = "FCOS_D2_CUDA=1 " if device_type == "cuda" else ""
    message = (
        f"fcos_d2: {name} runs on {device_type} as plain PyTorch, which is slow, because "
        f"{_FOLDER / library}.so is not built; build it {_HOW_TO_BUILD.format(variable, variable)}"
    )
    if os.environ.get("FCOS_D2_STRICT") == "1":
        raise RuntimeError(f"{message}; FCOS_D2_STRICT=1 makes this an error")
    with _warning_lock:
        is_first, _has_warned = not _has_warned, True
    if is_first:
        warnings.warn(message, stacklevel=2)


def backend() -> dict[str, dict[str, str]]:
    """Returns which implementation runs: op -> {"CPU" or "CUDA": "compiled" or "reference"}."""
    return {
        name: {
            key: "compiled" if _has_kernel(name, key) else "reference" for key in ("CPU", "CUDA")
        }
        for name in OPS
    }


def build_info() -> dict | None:
    """Returns how the compiled library was built (torch, compiler, ...); None if there is none."""
    if not _compiled_libraries():
        return None
    return json.loads(getattr(torch.ops, NAMESPACE).build_info())


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def _compiled_libraries() -> list[Path]:
    paths = sorted(_FOLDER.glob("_C*.so"))
    # torch without CUDA cannot load the CUDA library.
    return [path for path in paths if path.stem != "_C_cuda" or torch.version.cuda is not None]


def _load_compiled_libraries() -> None:
    for path in _compiled_libraries():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            cause = error.__cause__ or error  # torch itself only names the file
            raise ImportError(
                f"fcos_d2: the compiled library {path} does not load with torch "
                f"{torch.__version__}: {cause}; rebuild it {_HOW_TO_BUILD.format('', '')}"
            ) from error
        _loaded.add(path.stem)


_load_compiled_libraries()
