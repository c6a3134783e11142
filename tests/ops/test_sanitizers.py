"""csrc/cpu and its bindings under AddressSanitizer and UBSan, for every instruction set.

The library is rebuilt so that the test chooses the instruction set (processor.h), and with the
sanitizers. The tests of the ops then run on it in a separate process.
"""

import functools
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from tests import native

from . import subprocesses

LEVELS = ["x86-64", "x86-64-v3", "x86-64-v4"]  # the compiler's names
FLAGS_OF_LEVEL = {"x86-64": set(), "x86-64-v3": {"avx2", "fma"}, "x86-64-v4": {"avx512vl"}}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
HERE, CSRC = Path(__file__).parent, native.ROOT / "csrc"

pytestmark = [
    pytest.mark.slow,  # builds the library twice
    pytest.mark.parametrize("implementation", ["reference"], indirect=True),
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 CPU"),
]


@functools.cache
def build(level: str, sanitized: bool) -> Path:
    """Builds the CPU library for a microarchitecture level."""
    sources = [CSRC / "bindings" / "cpu.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    sources.append(HERE / "processor.cpp")
    folder = native.ROOT / "build" / "processors" / ("sanitized" if sanitized else "plain")
    options = ["-include", str(HERE / "processor.h")]
    options += ["-O1", "-g1", *SANITIZERS] if sanitized else []
    commands = {}
    for source in sources:
        command, target = [*native.compile_command(), *options, "-c", str(source)], source.name
        if (
            "FCOS_CLONES" in source.read_text()
        ):  # cloned by the compiler, not dispatched by our code
            command.append(f'-DTEST_CPU_TARGET="arch={level}"')
            target = f"{level}-{target}"
        commands[folder / f"{target}.o"] = command
    link = [native.COMPILER, "-shared", *native.LINK_TORCH, *(SANITIZERS[:1] if sanitized else [])]
    return native.build(folder / f"{level}.so", commands, link)


def run(folder: Path, level: str, *arguments: str, sanitized: bool = False):
    """Runs Python with the ops for a microarchitecture level."""
    if level not in LEVELS[:1] and not has_instructions(level):
        pytest.skip(f"this CPU does not support {level}")
    environment = {"FCOS_D2_TEST_CPU": level}
    if sanitized:
        environment |= sanitizer_environment()
    subprocesses.make_package(folder, build(level, sanitized))
    return subprocesses.run_python(folder, "-W", "ignore", *arguments, **environment)


def has_instructions(level: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return FLAGS_OF_LEVEL[level] <= set(flags)


def sanitizer_environment() -> dict[str, str]:
    """Returns environment variables that preload AddressSanitizer."""
    find = [native.COMPILER, "-print-file-name=libasan.so"]
    asan = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("needs libasan")
    return {
        "LD_PRELOAD": f"{asan} libstdc++.so.6",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


# Saves focal losses and gradients for every dtype, layout and loop of the kernel, and NMS results.
RESULTS = """
import ctypes, sys, torch
from fcos_d2 import ops
torch.manual_seed(0)
torch.set_num_threads(1)
results = []
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for layout in (torch.contiguous_format, torch.channels_last):
        for gamma in (0.0, 1.0, 1.5, 2.0):
            for sizes in ((2, 20, 9, 13), (1, 7, 1, 1)):
                x = (torch.randn(sizes) * 12).to(dtype).to(memory_format=layout).requires_grad_()
                points = sizes[2] * sizes[3]
                labels = torch.randint(-1, sizes[1] + 1, (sizes[0], points), dtype=torch.int32)
                loss = ops.sigmoid_focal_loss([x], labels, 0.25, gamma)
                results += [loss.detach(), *torch.autograd.grad(loss, x)]
corner = torch.rand(2, 400, 2) * 50
boxes = torch.cat((corner, corner + torch.rand(2, 400, 2) * 30), dim=2)
classes = torch.randint(0, 2, (2, 400))
kept = [*ops.batched_nms_padded(boxes, torch.rand(2, 400), classes, 0.5)]
kept.append(ops.batched_nms(boxes[0], torch.rand(400), classes[0], 0.6))
queries = ctypes.c_int.in_dll(ctypes.CDLL("fcos_d2/_C.so"), "test_cpu_queries")
assert queries.value > 0, "the kernels did not query the instruction set"
torch.save((results, kept), sys.argv[1])
"""


def results_of(folder: Path, level: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    folder.mkdir()
    done = run(folder, level, "-c", RESULTS, "results.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("level", LEVELS[1:])
def test_instruction_sets_agree(level, tmp_path):
    baseline, kept_by_baseline = results_of(tmp_path / "baseline", LEVELS[0])
    losses, kept = results_of(tmp_path / "level", level)
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_by_baseline, strict=True))
    for got, want in zip(losses, baseline, strict=True):
        rtol = {4: 1e-6, 8: 1e-13}.get(got.element_size(), torch.finfo(got.dtype).eps)
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-7)
    same = [torch.equal(a, b) for a, b in zip(losses, baseline, strict=True)]
    assert not all(same), "fused multiply-adds round differently: the same code ran twice"


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_are_clean_under_the_sanitizers(level, tmp_path):
    names = ["assign_targets", "sigmoid_focal_loss", "box_loss", "select_candidates", "batched_nms"]
    files = [str(HERE / f"test_{name}.py") for name in (*names, "properties")]
    # Tests that do not depend on the instruction set run once.
    only = "compiled" if level == LEVELS[-1] else "compiled and (focal or label or kept or padded)"
    # -s: a sanitizer ends the process, and pytest's captured output would be lost.
    options = ["-x", "-s", "-m", "not slow", "-k", only]
    done = run(tmp_path, level, "-c", subprocesses.RUN_TESTS, *options, *files, sanitized=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


OUT_OF_BOUNDS = """
import torch
from fcos_d2 import ops
x, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, dtype=torch.int32)
torch.ops.fcos_d2.sigmoid_focal_loss([x], labels, 0.25, 2.0)
"""


def test_sanitizers_detect_an_out_of_bounds_read(tmp_path):
    # The raw op, bypassing the checks of the wrapper: labels of half the points.
    done = run(tmp_path, LEVELS[0], "-c", OUT_OF_BOUNDS, sanitized=True)
    assert done.returncode != 0, done.stdout
    assert "ERROR: AddressSanitizer" in done.stderr and "focal_strip.inl" in done.stderr
