"""Tests setup.py's CUDA build, and the code that nvcc generates from csrc/cuda."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension

from tests import native

KERNELS = sorted((native.ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = native.setup_py().NVCC
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


# ---- Decisions of setup.py ----


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Returns a function that adds an nvcc to a machine with torch for CUDA 13.2."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_75 sm_80 sm_100", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))

    def nvcc(home: str = "cuda", version: str = "13.0") -> Path:
        script = tmp_path / home / "bin" / "nvcc"
        script.parent.mkdir(parents=True)
        script.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--list-gpu-arch) echo compute_80; echo compute_90; echo compute_100 ;;
--dryrun) echo '#$ TOP={tmp_path / home}/bin/..' >&2 ;;
esac
""")
        script.chmod(0o755)
        return script

    (tmp_path / "bin").mkdir()
    # The compiler only needs to exist.
    environment = {"PATH": str(tmp_path / "bin"), "CXX": sys.executable}
    with mock.patch.dict(os.environ, environment, clear=True):
        yield nvcc


def find_libraries() -> list[str]:
    return [extension.name for extension in native.load_setup().find_libraries()]


def test_cuda_library_is_built_if_nvcc_is_found(machine, monkeypatch, capsys):
    assert find_libraries() == ["fcos_d2._C"]
    monkeypatch.setenv("CUDA_HOME", str(machine().parents[1]))
    assert find_libraries() == ["fcos_d2._C", "fcos_d2._C_cuda"]
    monkeypatch.setenv("FCOS_D2_CUDA", "0")
    assert find_libraries() == ["fcos_d2._C"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("version", "cuda", "said"),
    [
        (None, "13.2", r'nvcc is missing; type: pip install "cuda-toolkit\[nvcc,.*\]==13\.2\.\*"'),
        ("12.8", "13.2", "nvcc is CUDA 12.8, torch needs 13.2; point CUDA_HOME to CUDA 13.2"),
        ("13.0", None, "torch .* has no CUDA"),
    ],
)
def test_missing_requirement_is_an_error_only_if_cuda_is_forced(
    machine, monkeypatch, tmp_path, capsys, version, cuda, said
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if version:
        monkeypatch.setenv("CUDA_HOME", str(machine(version=version).parents[1]))
    (tmp_path / "bin" / "nvidia-smi").symlink_to("/bin/sh")
    assert find_libraries() == ["fcos_d2._C"]
    assert re.search(said, capsys.readouterr().err)
    monkeypatch.setenv("FCOS_D2_CUDA", "1")
    with pytest.raises(SystemExit, match=said):
        find_libraries()


def test_build_without_a_gpu_targets_all_architectures_of_torch_and_nvcc(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine().parents[1]))
    find_libraries()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;10.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    find_libraries()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_nvcc_is_found_in_cuda_home_then_on_path_then_in_packages(machine, monkeypatch, tmp_path):
    def found() -> Path:
        setup = native.load_setup()
        return Path(setup.NVCC), Path(setup.HOME)

    packaged = machine("packages/nvidia/cu13")
    assert found() == (packaged, packaged.parents[1])
    (tmp_path / "bin" / "nvcc").symlink_to(toolkit := machine("toolkit"))
    assert found() == (tmp_path / "bin" / "nvcc", toolkit.parents[1]), "a link is followed"
    monkeypatch.setenv("CUDA_HOME", str(machine("home").parents[1]))
    assert found() == (tmp_path / "home/bin/nvcc", tmp_path / "home")


# ---- Register budgets ----

# Registers per thread. With 64, a multiprocessor holds 1024 threads.
BUDGETS = {
    "assign_kernel": 40,
    "flat_kernel": 48,
    "finish_kernel": 128,  # one block of 512 threads per multiprocessor
}
DEFAULT_BUDGET = 64
DOUBLE_BUDGET = 128  # float64 is only for gradient checks

KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_kernels(folder: Path, architecture: str) -> str:
    """Compiles csrc/cuda to objects in ``folder``; returns the output of ptxas."""

    def compile_one(source: Path) -> str:
        command = [
            NVCC, "-std=c++20", "-O3", f"-ccbin={native.COMPILER}", "-Xcompiler=-fPIC",
            "-Xptxas=-v", "-Werror=all-warnings", f"-arch={architecture}",
            "-c", str(source), "-o", str(folder / f"{source.stem}.o"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        return done.stderr

    largest_first = sorted(KERNELS, key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "\n".join(pool.map(compile_one, largest_first))


def assert_within_budget(report: str) -> None:
    kernels = list(KERNEL.finditer(report))
    assert len({kernel["symbol"] for kernel in kernels}) >= 30
    for kernel in kernels:
        symbol, spills = kernel["symbol"], int(kernel["stores"]) + int(kernel["loads"])
        name = re.search(r"[a-z_]+_kernel", symbol)[0]
        is_double = f"{name}Id" in symbol
        assert spills == 0, f"{symbol} spills {spills} bytes on {kernel['arch']}"
        budget = DOUBLE_BUDGET if is_double else BUDGETS.get(name, DEFAULT_BUDGET)
        used = int(kernel["registers"])
        assert used <= budget, f"{symbol} uses {used} of {budget} registers on {kernel['arch']}"


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> tuple[Path, str]:
    """(folder with objects for sm_90, output of ptxas)."""
    folder = tmp_path_factory.mktemp("cuda")
    return folder, compile_kernels(folder, "sm_90")


@needs_nvcc
def test_kernels_compile_without_warnings_within_their_register_budget(hopper):
    assert_within_budget(hopper[1])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "sm_120"])
def test_register_budgets_hold_on_other_architectures(architecture, tmp_path):
    assert_within_budget(compile_kernels(tmp_path, architecture))


# ---- SASS of inner loops ----


def find_disassembler() -> str | None:
    places = [os.environ["PATH"], f"{native.setup_py().HOME}/bin"]
    if triton := importlib.util.find_spec("triton"):
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


needs_disassembler = pytest.mark.skipif(not find_disassembler(), reason="needs cuobjdump")


class Instruction:
    """One line of SASS."""

    def __init__(self, address: str, text: str) -> None:
        self.address, self.text = int(address, 16), text
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        self.target = int(target[1], 16) if target else -1  # of a branch
        self.is_wide_load = "LDG" in text and ".128" in text


def disassemble(path: Path, kernel: str) -> list[Instruction]:
    command = [find_disassembler(), "-sass", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (body,) = (part for part in output.split("Function : ")[1:] if kernel in part.split("\n")[0])
    return [Instruction(*line) for line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", body)]


def loop_with_most_wide_loads(code: list[Instruction]) -> list[Instruction]:
    place = {instruction.address: i for i, instruction in enumerate(code)}
    ends = ((place.get(c.target, len(code)), i) for i, c in enumerate(code))
    loops = [code[first : last + 1] for first, last in ends if first < last]
    return max(loops, key=lambda loop: (sum(c.is_wide_load for c in loop), -len(loop)))


def shortest_iteration(loop: list[Instruction]) -> list[Instruction]:
    """Returns the shortest path through an iteration, which most rows take."""
    place = {instruction.address: i for i, instruction in enumerate(loop)}
    rest = [loop[-1:]] * len(loop)  # shortest path from each instruction to the end
    for i in reversed(range(len(loop) - 1)):
        target = place.get(loop[i].target, 0)
        paths = [rest[target]] if target > i else []
        if loop[i].text.startswith("@") or not paths:  # conditional, or no branch
            paths.append(rest[i + 1])
        rest[i] = [loop[i], *min(paths, key=len)]
    return rest[0]


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
@pytest.mark.parametrize(
    "loss, grad, most", [(True, False, 20), (False, True, 23), (True, True, 26)]
)
def test_inner_loop_of_focal_loss(hopper, dtype, loss, grad, most):
    """Per element: 2 special functions and few instructions. Two 16-byte loads in flight."""
    kernel = f"loss_kernelI{dtype}Li2ELb{loss:d}ELb{grad:d}E"
    code = disassemble(hopper[0] / "fcos_loss.o", kernel)
    path = shortest_iteration(loop_with_most_wide_loads(code))
    texts = [instruction.text for instruction in path]
    elements = 2 * 8  # rows per iteration, elements per row
    assert sum("MUFU" in text for text in texts) == 2 * elements
    assert len(texts) <= most * elements
    assert not any("CALL" in text for text in texts)
    first_use = next(i for i, text in enumerate(texts) if "MUFU" in text)
    assert sum(instruction.is_wide_load for instruction in path[:first_use]) == 2
    stores = sum("STG" in text and ".128" in text for text in texts)
    assert stores == (2 if grad else 0)


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
def test_scan_of_logits(hopper, dtype):
    """Issues four 16-byte loads before it uses the first, and few instructions per logit."""
    code = disassemble(hopper[0] / "select_candidates.o", f"scan_kernelI{dtype}E")
    first, *_, last = wide = [i for i, c in enumerate(code) if c.is_wide_load]
    assert len(wide) == 4
    assert not any("FSETP" in c.text for c in code[first:last])
    end = next(i for i in range(last, len(code)) if "BAR." in code[i].text)
    logits = 4 * 8
    assert sum("FSETP" in c.text for c in code[last:end]) == logits
    assert end - first <= 8 * logits
