"""Runs the kernels of csrc/cuda on the CPU, as the PTX that nvcc makes of them.

nvcc compiles csrc/cuda as for a GPU; its host code finds runtime.cpp in the place of the CUDA
runtime, which hands the kernels to an interpreter of PTX. ``overloads()`` are the ops that run so.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from tests.ops.backends import Overloads, reference_of, register_ops

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "ptx"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
MACHINE = sorted(HERE.glob("*.cpp"))
BINDING = ROOT / "csrc" / "bindings" / "cuda.cpp"
RAW = "fcos_d2_ptx_raw"  # the ops of the binding
NAMESPACE = "fcos_d2_ptx"  # the same with their tensors made known to the machine
# What the binding asks torch, and runtime.cpp answers.
RENAMED = {
    "aoti_torch_get_current_cuda_stream": "ptx_get_current_cuda_stream",
    "aoti_torch_create_device_guard": "ptx_create_device_guard",
    "aoti_torch_delete_device_guard": "ptx_delete_device_guard",
    "torch_call_dispatcher": "ptx_call_dispatcher",
}
NINJA = """
builddir = {build}
rule nvcc
  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart none -Xlinker -Bsymbolic $in $flags -o $out
"""


def find_nvcc() -> str | None:
    """nvcc of PATH, of CUDA_HOME, or of a toolkit that pip has installed."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = [path for path in sys.path if path.endswith("site-packages")]
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *(f"{home}/bin" for home in homes)]
    folders += [str(x) for path in packages for x in Path(path).glob("nvidia/cu*/bin")]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return found and os.path.realpath(found)  # it looks for its parts beside itself


def missing() -> str | None:
    """Why the PTX cannot run here; None where it can."""
    if find_nvcc() is None:
        return "needs nvcc"
    if importlib.util.find_spec("ninja") is None:
        return "needs ninja"
    return None if shutil.which("g++") else "needs g++"


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, the host code of the kernels, and the binding that launches them."""
    path = build("ops", [*KERNELS, BINDING])
    torch.ops.load_library(path)
    return prepare(path, [ptx_of(source) for source in KERNELS])


def prepare(path: Path, programs: Sequence[Path]) -> ctypes.CDLL:
    """A machine that runs the kernels of these PTX files."""
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
    """Reads a PTX file, in the place of one of the same name that was read before."""
    refusal = machine.ptx_load(str(program).encode())
    assert refusal is None, refusal.decode()


def take_records() -> dict[str, dict]:
    """What has run since the last call, by kernel: launches, blocks, instructions and so on."""
    return json.loads(library().ptx_take_records())


@contextlib.contextmanager
def schedule(number: int, machine: ctypes.CDLL | None = None) -> Iterator[None]:
    """Runs blocks one after the other (0), or several at once in orders that the number names."""
    machine = machine or library()
    machine.ptx_set_schedule(number)
    try:
        yield
    finally:
        machine.ptx_set_schedule(0)


# ---- the ops ----

_LOCK = threading.RLock()  # there is one machine


@functools.cache
def overloads() -> Overloads:
    """All ops again, under another name, run by the kernels in PTX."""
    raw = register_ops(RAW, reference_of)
    library()
    return register_ops(NAMESPACE, lambda name: _with_known_tensors(raw[name]))


def _with_known_tensors(op: torch._ops.OpOverload):
    """The op in a machine that knows its tensors and no others."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
    assert has_kernel, f"csrc/bindings/cuda.cpp has no {op.name()}"

    def run(*arguments):
        machine, is_mutable = library(), op._schema.is_mutable
        with _LOCK:
            try:
                for begin, end in _places(arguments):
                    machine.ptx_add_tensor(begin, end - begin, True, not is_mutable)
                results = op(*arguments)
                for begin, end in _places(results):
                    missing = machine.ptx_count_unwritten(begin, end - begin)
                    assert missing == 0, f"{op.name()} has left {missing} bytes unwritten"
            finally:
                machine.ptx_forget_tensors()
        return results

    return run


def _places(tensors) -> list[tuple[int, int]]:
    """Where tensors lie, as [begin, end); those that overlap are one."""
    places = []
    for x in tree_leaves(tensors):
        if isinstance(x, torch.Tensor) and x.numel() > 0:
            steps = ((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            places.append((x.data_ptr(), x.data_ptr() + (1 + sum(steps)) * x.element_size()))
    out: list[tuple[int, int]] = []
    for begin, end in sorted(places):
        if out and begin < out[-1][1]:
            begin, end = out[-1][0], max(end, out.pop()[1])
        out.append((begin, end))
    return out


# ---- building ----


def ptx_of(source: Path) -> Path:
    """The PTX that nvcc has made of a file, beside the object."""
    return BUILD / f"{source.stem}.ptx"


def build(name: str, sources: Sequence[Path]) -> Path:
    """Compiles what has changed of these files and of the machine, and links it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    output = BUILD / f"{name}.so"
    lines = [NINJA.format(nvcc=find_nvcc(), build=BUILD)]
    objects = []
    for source in [*sources, *MACHINE]:
        target = BUILD / f"{source.stem}.o"
        flags = " ".join(flags_of(source)).replace("$", "$$")
        lines.append(f"build {target}: nvcc {source}\n  flags = {flags}")
        objects.append(str(target))
    torch_folder = Path(torch.__file__).parent / "lib"
    lines.append(f"build {output}: link {' '.join(objects)}")
    lines.append(f"  flags = -L{torch_folder} -ltorch_cpu\n")
    failure = run_ninja(name, "\n".join(lines))
    assert failure is None, failure
    return output


@functools.cache  # what has failed once will not be tried by every test
def run_ninja(name: str, rules: str) -> str | None:
    """Builds what is out of date; returns what went wrong."""
    file = BUILD / f"{name}.ninja"
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists() or file.read_text() != rules:
            file.write_text(rules)
        command = [sys.executable, "-m", "ninja", "-f", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stdout + done.stderr


def flags_of(source: Path) -> list[str]:
    """Arguments of nvcc for one file."""
    shared = ["-std=c++20", "-Xcompiler=-fPIC", f"-isystem={Path(torch.__file__).parent}/include"]
    if source.suffix == ".cu":  # as setup.py does, with lines for messages
        keep = ["--keep", f"--keep-dir={BUILD}"]
        return [*shared, "-O3", "-lineinfo", "-gencode=arch=compute_90,code=compute_90", *keep]
    shared += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    if source == BINDING:
        renamed = [f"-D{name}={ours}" for name, ours in RENAMED.items()]
        return [*shared, *renamed, f"-DFCOS_D2_NAMESPACE={RAW}", "-DFCOS_D2_DISPATCH_KEY=CPU"]
    # Every instruction rounds for itself.
    return [*shared, "-O3", "-Xcompiler=-march=native,-ffp-contract=off,-Wall,-Wextra"]
