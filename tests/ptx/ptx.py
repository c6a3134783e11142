"""Runs the kernels of csrc/cuda on the CPU by interpreting their PTX.

nvcc compiles csrc/cuda as for a GPU, and the host code is linked to runtime.cpp instead of the CUDA
runtime, which passes the kernels to the interpreter. ``overloads()`` are the ops that run this way.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from tests import native
from tests.ops.backends import Overloads, reference_of, register_ops

from . import small_tiles

HERE = Path(__file__).parent
CSRC = native.ROOT / "csrc"
SMALL_TILES = "FCOS_D2_SMALL_TILES"  # environment variable that selects the kernels of small_tiles
BUILD = native.ROOT / "build" / ("ptx_small_tiles" if os.environ.get(SMALL_TILES) else "ptx")
SOURCE = small_tiles.copy(CSRC, BUILD / "csrc") if os.environ.get(SMALL_TILES) else CSRC
KERNELS = sorted(SOURCE / "cuda" / path.name for path in CSRC.glob("cuda/*.cu"))
MACHINE = sorted(HERE.glob("*.cpp"))
BINDING = CSRC / "bindings" / "cuda.cpp"
RAW = "fcos_d2_ptx_raw"  # the ops of the binding (binding.h)
NAMESPACE = "fcos_d2_ptx"  # the same with their tensors made known to the machine


def missing() -> str | None:
    """Returns the reason why the PTX cannot run here, or None."""
    return native.missing() or (None if native.setup_py().NVCC else "needs nvcc")


@functools.cache
def library() -> ctypes.CDLL:
    """Loads the interpreter with the kernels' host code and the binding that launches them."""
    path = build("ops", (*KERNELS, BINDING))
    torch.ops.load_library(path)
    return prepare(path, [ptx_of(source) for source in KERNELS])


def prepare(path: Path, programs: Sequence[Path]) -> ctypes.CDLL:
    """Loads a machine that runs the kernels in ``programs``, which are PTX files."""
    machine = ctypes.CDLL(str(path))
    machine.ptx_load.restype = machine.ptx_take_records.restype = ctypes.c_char_p
    machine.ptx_add_tensor.argtypes = [
        ctypes.c_void_p, ctypes.c_uint64, ctypes.c_bool, ctypes.c_bool
    ]  # fmt: skip
    machine.ptx_count_unwritten.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    machine.ptx_count_unwritten.restype = ctypes.c_uint64
    machine.ptx_set_schedule.argtypes = [ctypes.c_uint64]
    for program in programs:
        load(machine, program)
    return machine


def load(machine: ctypes.CDLL, program: Path) -> None:
    """Loads a PTX file; replaces one of the same name that was loaded before."""
    error = machine.ptx_load(str(program).encode())
    assert error is None, error.decode()


def take_records() -> dict[str, dict]:
    """Returns and resets the counts of launches, blocks, instructions and more, by kernel."""
    return json.loads(library().ptx_take_records())


@contextlib.contextmanager
def schedule(number: int, machine: ctypes.CDLL | None = None) -> Iterator[None]:
    """Runs blocks one after the other (0), or several at once in an order given by the seed."""
    machine = machine or library()
    machine.ptx_set_schedule(number)
    try:
        yield
    finally:
        machine.ptx_set_schedule(0)


# ---- the ops ----

_LOCK = threading.RLock()  # there is only one interpreter


@functools.cache
def overloads() -> Overloads:
    """Registers all ops in another namespace, with the PTX kernels."""
    raw = register_ops(RAW, reference_of)
    library()
    return register_ops(NAMESPACE, lambda name: _with_known_tensors(raw[name]))


def _with_known_tensors(op: torch._ops.OpOverload):
    """Runs the op with exactly its own tensors registered with the interpreter."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
    assert has_kernel, f"csrc/bindings/cuda.cpp has no {op.name()}"

    changed = [x.alias_info is not None and x.alias_info.is_write for x in op._schema.arguments]

    def run(*arguments):
        machine = library()
        with _LOCK:
            try:
                for is_changed in (False, True):
                    these = [x for x, y in zip(arguments, changed, strict=False) if y == is_changed]
                    for begin, end in _address_ranges(these):
                        machine.ptx_add_tensor(begin, end - begin, True, not is_changed)
                results = op(*arguments)
                for begin, end in _address_ranges(results):
                    missing = machine.ptx_count_unwritten(begin, end - begin)
                    assert missing == 0, f"{op.name()} has left {missing} bytes unwritten"
            finally:
                machine.ptx_forget_tensors()
        return results

    return run


def _address_ranges(tensors) -> list[tuple[int, int]]:
    """Returns the address ranges [begin, end) of tensors, with overlapping ones merged."""
    ranges = []
    for x in tree_leaves(tensors):
        if isinstance(x, torch.Tensor) and x.numel() > 0:
            steps = ((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            ranges.append((x.data_ptr(), x.data_ptr() + (1 + sum(steps)) * x.element_size()))
    out: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if out and begin < out[-1][1]:
            begin, end = out[-1][0], max(end, out.pop()[1])
        out.append((begin, end))
    return out


# ---- building ----


def ptx_of(source: Path) -> Path:
    """Returns the path of the PTX of a source file, next to its object file."""
    return BUILD / f"{source.stem}.ptx"


def build(name: str, sources: tuple[Path, ...]) -> Path:
    """Compiles these files and the interpreter if they have changed, and links them."""
    library = try_to_build(name, sources)
    assert isinstance(library, Path), library
    return library


@functools.cache  # failures too, or every test would try again
def try_to_build(name: str, sources: tuple[Path, ...]) -> Path | str:
    BUILD.mkdir(parents=True, exist_ok=True)
    commands = {
        BUILD / f"{source.stem}.o": compile_command(source) for source in (*sources, *MACHINE)
    }
    # Our CUDA runtime takes precedence over torch's.
    link = [native.COMPILER, "-shared", "-Wl,-Bsymbolic", *native.LINK_TORCH]
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return native.build(BUILD / f"{name}.so", commands, link)
        except AssertionError as failure:
            return str(failure)


def compile_command(source: Path) -> list[str]:
    if source.suffix == ".cu":  # as setup.py does, with lines for messages
        options = ["-lineinfo", "--keep", f"--keep-dir={BUILD}", "-Xcompiler=-fPIC"]
        options += ["-gencode=arch=compute_90,code=compute_90", f"-ccbin={native.COMPILER}"]
        return [native.setup_py().NVCC, "-std=c++20", "-O3", *options, "-c", str(source)]
    command = [*native.compile_command(), "-DUSE_CUDA", f"-isystem{native.setup_py().HOME}/include"]
    if source == BINDING:
        return [*command, "-include", str(HERE / "binding.h"), "-c", str(source)]
    # No fused multiply-adds.
    return [*command, "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-c", str(source)]
