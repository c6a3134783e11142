"""Builds csrc/cuda and its binding for the CPU (see csrc/README.md) and offers the ops that run it.

``emulated.ops().assign_targets(...)`` takes what ``torch.ops.fcos_d2.assign_targets`` takes, on CPU
tensors. Outputs are poisoned before every call: what a kernel leaves unwritten is NaN or huge.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from tests import native
from tests.native import COMPILER
from tests.ops.backends import Overloads, reference_of, register_ops

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
NAMESPACE = "fcos_d2_emulated"
missing = native.missing
# Processes under AddressSanitizer (test_sanitizers.py) have this in their environment.
SANITIZED = os.environ.get("FCOS_D2_EMULATION") == "sanitized"

EMULATOR = [HERE / "fiber.cpp", HERE / "emulator.cpp"]
SOURCES = {
    "ops": [
        *EMULATOR,
        HERE / "torch_standins.cpp",
        *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        ROOT / "csrc" / "bindings" / "cuda.cpp",
    ],
    "faults": [*EMULATOR, HERE / "faults.cu"],
}
# The questions about the GPU that torch_standins.cpp answers.
RENAMED = ("get_current_cuda_stream", "create_device_guard", "delete_device_guard")
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fsanitize-sections=emulated_shared",  # not looked at unless named
]


@functools.cache
def overloads() -> Overloads:
    """All ops again, under another name; those of csrc/bindings/cuda.cpp run its kernels."""
    overloads = register_ops(NAMESPACE, reference_of)
    torch.ops.load_library(build("ops"))
    return overloads


@functools.cache
def ops() -> SimpleNamespace:
    """The ops that csrc/bindings/cuda.cpp registers, by name."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return SimpleNamespace(
        **{
            name: poison()(op)
            for name, op in overloads().items()
            if has_kernel(f"{NAMESPACE}::{name}", "CPU")
        }
    )


@contextlib.contextmanager
def poison():
    """A world where torch.empty returns NaN and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def schedule(number: int, library: str = "ops"):
    """Runs blocks and threads in order (0), or in other orders that the number stands for."""
    set_schedule = ctypes.CDLL(str(build(library))).emulation_set_schedule
    set_schedule(number)
    try:
        yield
    finally:
        set_schedule(0)


@functools.cache
def build(library: str, sanitized: bool = SANITIZED) -> Path:
    """Compiles what has changed of a library of SOURCES and links it."""
    folder = ROOT / "build" / "emulation" / ("sanitized" if sanitized else "plain")
    command = [COMPILER, "-x", "c++", *compile_arguments(sanitized)]
    commands = {
        folder / f"{source.name}.o": [*command, "-c", str(source)] for source in SOURCES[library]
    }
    link = [COMPILER, "-shared", *(SANITIZERS[:1] if sanitized else [])]
    link += native.LINK_TORCH if library == "ops" else []
    return native.build(folder / f"{library}.so", commands, link)


def has_fma() -> bool:
    """Whether the processor fuses multiply and add, as every GPU does."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " fma " in cpuinfo.read_text()


def compile_arguments(sanitized: bool) -> list[str]:
    return [
        *native.setup_py().FLAGS,
        "-g1",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",  # unroll
        "-O1",
        *(SANITIZERS if sanitized else []),
        # As nvcc does, a product and a sum become one operation, rounded once.
        "-ffp-contract=fast",
        *(["-mfma"] if has_fma() else []),
        f"-I{HERE / 'include'}",
        f"-isystem{native.TORCH / 'include'}",
        *(f"-Daoti_torch_{name}=emulated_{name}" for name in RENAMED),
        f"-DFCOS_D2_NAMESPACE={NAMESPACE}",
        "-DFCOS_D2_DISPATCH_KEY=CPU",
    ]
