"""Declares the ops to torch and loads the compiled kernels.

Every op is declared once, in Python, with its reference as the implementation for all devices
(``CompositeExplicitAutograd``). A compiled library adds kernels for ``CPU`` and ``CUDA``, which the
dispatcher prefers: nothing else in the package knows or asks which of the two runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

NAMESPACE = "fcos_d2"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Definition(NamedTuple):
    """What makes an op: see ``define_op`` and ``define_autograd``."""

    schema: str
    reference: Callable
    fake: Callable
    backward: Callable | None = None
    setup_context: Callable | None = None


OPS: dict[str, Definition] = {}


def define_op(schema: str, reference: Callable, fake: Callable) -> Callable:
    """Declares ``schema`` with its reference implementation and its fake (shape-only) kernel.

    Returns:
        The overload to call, ``torch.ops.fcos_d2.<name>.default``.
    """
    name = schema.split("(", 1)[0]
    OPS[name] = Definition(schema, reference, fake)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives op ``name`` the derivative ``backward`` (see ``torch.library.register_autograd``)."""
    OPS[name] = OPS[name]._replace(backward=backward, setup_context=setup_context)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def forbid_double_backward(name: str) -> None:
    """Makes differentiating the gradient op ``name`` an error instead of a silent zero."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"fcos_d2::{name} has no second derivative; call backward() without create_graph=True"
        )

    define_autograd(name, backward, setup_context=lambda ctx, inputs, output: None)


def backend() -> dict[str, dict[str, str]]:
    """Which implementation runs: op -> {"CPU" or "CUDA": "compiled" or "reference"}."""
    return {
        name: {
            key: "compiled" if _has_kernel(name, key) else "reference" for key in ("CPU", "CUDA")
        }
        for name in OPS
    }


def build_info() -> dict | None:
    """What the compiled library was built with (torch, compiler, flags); None without one."""
    if not _compiled_libraries():
        return None
    return json.loads(getattr(torch.ops, NAMESPACE).build_info())


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def _compiled_libraries() -> list[Path]:
    paths = sorted(Path(__file__).parents[1].glob("_C*.so"))
    # A torch without CUDA has nothing to open the other one with.
    return [path for path in paths if path.stem != "_C_cuda" or torch.version.cuda is not None]


def _load_compiled_libraries() -> None:
    for path in _compiled_libraries():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise ImportError(
                f"fcos_d2: the compiled library {path.name} does not load with torch "
                f"{torch.__version__}: {error}; rebuild it with: pip install --no-deps -e ."
            ) from error


_load_compiled_libraries()
