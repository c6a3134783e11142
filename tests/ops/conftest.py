"""Runs every test of the ops on every implementation that is there."""

import sys

import pytest
import torch

from fcos_d2.ops import _library, backend

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


_define_reference()
_IS_COMPILED = any("compiled" in keys.values() for keys in backend().values())


@pytest.fixture(
    autouse=True,
    params=[
        "reference",
        pytest.param(
            "compiled", marks=pytest.mark.skipif(not _IS_COMPILED, reason="nothing is compiled")
        ),
    ],
)
def implementation(request, monkeypatch) -> str:
    """Makes the wrappers call the reference, or whatever the dispatcher prefers."""
    if request.param == "reference":
        for module in {sys.modules[op.fake.__module__] for op in _library.OPS.values()}:
            for attribute, value in list(vars(module).items()):
                if isinstance(value, torch._ops.OpOverload):
                    name = value.name().split("::")[1]
                    shadow = getattr(torch.ops.fcos_d2_reference, name).default
                    monkeypatch.setattr(module, attribute, shadow)
    return request.param
