"""Runs every test of the ops on every implementation that is there.

The emulated kernels run in other orders of blocks and threads in every launch.
"""

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch

from fcos_d2.ops import _library, backend
from tests.emulation import emulated

REFERENCE = torch.library.Library("fcos_d2_reference", "DEF")


def _define_reference() -> None:
    """The ops again, under a name for which no compiled kernel exists."""
    for name, op in _library.OPS.items():
        REFERENCE.define(op.schema)
        REFERENCE.impl(name, op.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fcos_d2_reference::{name}", op.fake, lib=REFERENCE)
        if op.backward is not None:
            torch.library.register_autograd(
                f"fcos_d2_reference::{name}",
                op.backward,
                setup_context=op.setup_context,
                lib=REFERENCE,
            )


def _overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.fcos_d2_reference, name).default


def _replace_ops(monkeypatch, overloads: dict[str, torch._ops.OpOverload]) -> None:
    """Lets the wrappers call other overloads."""
    for module in {sys.modules[op.fake.__module__] for op in _library.OPS.values()}:
        for attribute, value in list(vars(module).items()):
            if isinstance(value, torch._ops.OpOverload):
                monkeypatch.setattr(module, attribute, overloads[value.name().split("::")[1]])


_define_reference()
_IS_COMPILED = any("compiled" in keys.values() for keys in backend().values())


@pytest.fixture(
    autouse=True,
    params=[
        "reference",
        pytest.param(
            "compiled", marks=pytest.mark.skipif(not _IS_COMPILED, reason="nothing is compiled")
        ),
        pytest.param(
            "emulated",
            marks=pytest.mark.skipif(
                emulated.missing() is not None, reason=str(emulated.missing())
            ),
        ),
    ],
)
def implementation(request, monkeypatch) -> Iterator[str]:
    """Makes the wrappers call the reference, what the dispatcher prefers, or CUDA's on the CPU."""
    if request.param == "reference":
        _replace_ops(monkeypatch, {name: _overload(name) for name in _library.OPS})
    with contextlib.ExitStack() as stack:
        if request.param == "emulated":
            _replace_ops(monkeypatch, emulated.overloads())
            stack.enter_context(emulated.poison())
            stack.enter_context(emulated.schedule(1))
        yield request.param
