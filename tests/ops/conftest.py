"""Runs every test of the ops on every available implementation.

All implementations take CPU tensors. CUDA kernels run in the PTX interpreter, with another random
schedule in every launch, and on the GPU if there is one, on copies of the tensors.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache

import pytest

from fcos_d2.ops import backend
from tests.ptx import ptx

from .backends import Overloads, on_gpu, overloads_of, reference_of, register_ops, use


def _has(device_type: str) -> bool:
    return any(devices[device_type] == "compiled" for devices in backend().values())


def _skip(reason: str | None) -> list[pytest.MarkDecorator]:
    return [pytest.mark.skipif(reason is not None, reason=str(reason))]


NOTHING_COMPILED = None if _has("CPU") else "nothing is compiled"
NO_KERNELS = None if _has("CUDA") else "fcos_d2/_C_cuda.so is not built"
ON_CUDA = [
    pytest.param("ptx", marks=_skip(ptx.missing())),
    pytest.param("cuda", marks=[pytest.mark.cuda, *_skip(NO_KERNELS)]),
]
IMPLEMENTATIONS = [
    "reference",
    pytest.param("compiled", marks=_skip(NOTHING_COMPILED)),
    *ON_CUDA,
]


@cache
def _overloads(implementation: str) -> Overloads:
    if implementation == "compiled":  # what the dispatcher selects
        return overloads_of("fcos_d2")
    if implementation == "ptx":
        return ptx.overloads()
    kernel_of = on_gpu if implementation == "cuda" else reference_of
    return register_ops(f"fcos_d2_{implementation}", kernel_of)


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def implementation(request) -> Iterator[str]:
    """Makes the wrappers call one implementation; returns its name."""
    name = request.param
    given = request.getfixturevalue("device").type if "device" in request.fixturenames else "cpu"
    if given == "cuda" and name in ("ptx", "cuda"):
        pytest.skip("only takes tensors on the CPU")
    with use(_overloads(name)), ptx.schedule(1) if name == "ptx" else nullcontext():
        yield name


@pytest.fixture
def overloads(implementation) -> Overloads:
    """Returns the ops that the wrappers call, by name."""
    return _overloads(implementation)


@pytest.fixture
def assertions_can_be_caught(implementation) -> None:
    """Skips tests on the GPU, where a failed device assertion ends the process."""
    if implementation == "cuda":
        pytest.skip("a failed assertion on a GPU ends the process")
