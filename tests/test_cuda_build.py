"""The CUDA half of the build: what setup.py decides, and what nvcc makes of csrc/cuda."""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
NVCC = SETUP.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


# ---- what setup.py decides ----


def script(path: Path, *lines: str) -> Path:
    """An executable that stands in for a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without CUDA, and ways to give it some: the functions gpu(), nvcc() and torch()."""
    for name in ("FCOS_D2_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])

    class Machine:
        @staticmethod
        def gpu(*capabilities: str) -> None:
            lines = (f"echo {capability}" for capability in capabilities)
            script(tmp_path / "bin" / "nvidia-smi", *lines)

        @staticmethod
        def nvcc(folder: str = "bin", version: str = "13.0") -> Path:
            return script(
                tmp_path / folder / "nvcc",
                'case "$1" in',
                f"--version) echo Cuda compilation tools, release {version}, V{version}.88 ;;",
                "--list-gpu-arch) echo compute_80; echo compute_90; echo compute_100 ;;",
                f"--dryrun) echo '#$ TOP={tmp_path / folder}/..' >&2 ;;",
                "esac",
            )

        @staticmethod
        def torch(cuda: str | None = "13.2") -> Path:
            folder = tmp_path / "site-packages" / "torch"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "version.py").write_text(
                f"__version__ = '2.15.0'\ncuda: Optional[str] = {cuda!r}\n"
            )
            return folder

    return Machine


def cuda_libraries(machine, **torch_options) -> list[str]:
    return [ext.name for ext in SETUP.find_cuda_libraries(machine.torch(**torch_options))]


def test_nothing_is_built_for_cuda_where_there_is_no_nvcc(machine, capsys):
    assert cuda_libraries(machine) == []
    assert capsys.readouterr().err == ""
    machine.gpu("9.0")  # then somebody may wonder
    assert cuda_libraries(machine) == []
    assert "cuda-toolkit[nvcc" in capsys.readouterr().err


def test_cuda_is_built_for_the_gpus_of_the_machine(machine):
    machine.nvcc()
    machine.gpu("9.0", "8.0", "9.0")
    (library,) = SETUP.find_cuda_libraries(machine.torch())
    assert library.name == "fcos_d2._C_cuda"
    assert [arg for arg in library.nvcc_args if "gencode" in arg] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    assert "-lcudart_static" in library.extra_link_args


@pytest.mark.parametrize(
    "listed", ["8.0;9.0;10.0+PTX", "8.0 9.0 10.0+PTX", "8.0,9.0,10.0+PTX;12.0"]
)
def test_listed_architectures_are_built_without_a_gpu_save_unknown_ones(
    machine, monkeypatch, listed
):
    machine.nvcc()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    (library,) = SETUP.find_cuda_libraries(machine.torch())
    assert [arg.split("code=")[-1] for arg in library.nvcc_args if "gencode" in arg] == [
        "sm_80", "sm_90", "sm_100", "compute_100",
    ]  # fmt: skip


def test_only_unknown_architectures_is_an_error_that_lists_the_known(machine, monkeypatch):
    machine.nvcc()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(SystemExit, match="compute_80 compute_90 compute_100"):
        cuda_libraries(machine)


def test_without_a_gpu_it_is_built_for_what_torch_was_built_for(machine, monkeypatch):
    machine.nvcc()
    monkeypatch.setattr(SETUP, "torch_architectures", lambda torch: ["7.5", "8.0", "12.0+PTX"])
    (library,) = SETUP.find_cuda_libraries(machine.torch())
    gencodes = [arg for arg in library.nvcc_args if "gencode" in arg]
    assert gencodes == ["-gencode=arch=compute_80,code=sm_80"]


def test_architectures_of_torch_end_with_code_for_later_gpus():
    if torch.version.cuda is None:
        pytest.skip("needs a torch with CUDA")
    *older, newest = SETUP.torch_architectures(Path(torch.__file__).parent)
    assert newest.endswith("+PTX") and all(re.fullmatch(r"\d+\.\d", name) for name in older)
    numbers = [float(name.removesuffix("+PTX")) for name in (*older, newest)]
    assert numbers == sorted(numbers)


def test_cuda_can_be_switched_off(machine, monkeypatch):
    machine.nvcc()
    machine.gpu("9.0")
    monkeypatch.setenv("FCOS_D2_CUDA", "0")
    assert cuda_libraries(machine) == []


def test_other_cuda_than_that_of_torch_names_both_and_the_fix(machine, monkeypatch, capsys):
    machine.nvcc(version="12.8")
    machine.gpu("9.0")
    assert cuda_libraries(machine) == []
    message = capsys.readouterr().err
    assert "nvcc is of CUDA 12.8 but torch was built with CUDA 13.2" in message
    assert "point CUDA_HOME to it" in message and "built without CUDA" in message
    monkeypatch.setenv("FCOS_D2_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc is of CUDA 12.8"):
        cuda_libraries(machine)


def test_missing_nvcc_names_the_command_to_type(machine, monkeypatch):
    monkeypatch.setenv("FCOS_D2_CUDA", "1")
    with pytest.raises(SystemExit, match=r'pip install "cuda-toolkit\[nvcc,.*\]==13\.2\.\*"'):
        cuda_libraries(machine)


def test_torch_without_cuda_is_left_alone_unless_cuda_is_forced(machine, monkeypatch):
    machine.nvcc()
    machine.gpu("9.0")
    assert cuda_libraries(machine, cuda=None) == []
    monkeypatch.setenv("FCOS_D2_CUDA", "1")
    with pytest.raises(SystemExit, match="needs a torch with CUDA, this is torch 2.15.0"):
        cuda_libraries(machine, cuda=None)


def test_nvcc_is_found_at_home_then_on_path_then_among_packages(machine, monkeypatch, tmp_path):
    assert SETUP.find_nvcc() is None
    packaged = machine.nvcc("site-packages/nvidia/cu13/bin")
    assert SETUP.find_nvcc() == str(packaged)
    real = machine.nvcc("toolkit/bin")
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "nvcc").symlink_to(real)
    assert SETUP.find_nvcc() == str(real), "a link is followed: nvcc looks beside itself"
    home = machine.nvcc("home/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert SETUP.find_nvcc() == str(home)


# ---- what nvcc makes of it ----

# Registers that a kernel may use: 64 let 1024 threads share a multiprocessor.
BUDGETS = {
    "assign_kernel": 40,
    "sums_kernel": 40,
    "padded_kernel": 40,
    "flat_kernel": 40,
    "finish_kernel": 128,  # a block for each level of an image: fewer than multiprocessors
}  # all others:
BUDGET = 64
DOUBLE_BUDGET = 128  # for checking gradients, not for speed

KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_kernels(folder: Path, architectures: list[str]) -> str:
    """Compiles csrc/cuda to objects in ``folder``; returns what ptxas says."""

    def compile_one(source: Path) -> str:
        command = [
            NVCC, "-std=c++20", "-O3", f"-ccbin={SETUP.COMPILER[0]}", "-Xcompiler=-fPIC",
            "-Xptxas=-v", "-Werror=all-warnings", *SETUP.gencode(NVCC, architectures),
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
        budget = DOUBLE_BUDGET if is_double else BUDGETS.get(name, BUDGET)
        used = int(kernel["registers"])
        assert used <= budget, f"{symbol} uses {used} of {budget} registers on {kernel['arch']}"


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> tuple[Path, str]:
    """(folder with objects for sm_90, what ptxas says)."""
    folder = tmp_path_factory.mktemp("cuda")
    return folder, compile_kernels(folder, ["9.0"])


@needs_nvcc
def test_kernels_compile_without_warning_within_their_registers(hopper):
    assert_within_budget(hopper[1])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["8.0", "10.0+PTX", "12.0"])
def test_kernels_of_other_gpus_are_within_their_registers(architecture, tmp_path):
    assert_within_budget(compile_kernels(tmp_path, [architecture]))


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
def test_library_links_and_its_kernels_are_registered(hopper, tmp_path, monkeypatch):
    folder, _ = hopper
    monkeypatch.chdir(ROOT)
    torch_folder = Path(torch.__file__).parent
    library = SETUP.cuda_library(NVCC, torch_folder)
    output, binding = tmp_path / "_C_cuda.so", tmp_path / "cuda.o"
    SETUP.compile_source("csrc/bindings/cuda.cpp", binding, library.extra_compile_args)
    objects = [str(binding), *(str(folder / f"{source.stem}.o") for source in KERNELS)]
    link = [*SETUP.COMPILER, "-shared", *objects, *library.extra_link_args, "-o", str(output)]
    subprocess.run([*link, "-Wl,--no-undefined", f"-L{torch_folder / 'lib'}", "-lc10"], check=True)
    code = f"""
import torch
from fcos_d2 import ops
torch.ops.load_library({str(output)!r})
for name, kernels in ops.backend().items():
    assert kernels["CUDA"] == "compiled", name
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


# ---- the inner loops, as the hardware will see them ----


def find_disassembler() -> str | None:
    places = [os.environ.get("PATH", "")]
    places += [str(Path(NVCC).parent)] if NVCC else []
    if triton := importlib.util.find_spec("triton"):
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


class Instruction:
    """One line of SASS."""

    def __init__(self, address: str, text: str) -> None:
        self.address = int(address, 16)
        self.text = text
        self.is_conditional = text.startswith("@")
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        self.target = int(target[1], 16) if target else None

    def is_wide_load(self) -> bool:
        return "LDG" in self.text and ".128" in self.text


def disassemble(path: Path, kernel: str) -> list[Instruction]:
    output = subprocess.run(
        [find_disassembler(), "-sass", str(path)], capture_output=True, text=True, check=True
    ).stdout
    (body,) = (part for part in output.split("Function : ")[1:] if kernel in part.split("\n")[0])
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", body)
    return [Instruction(address, text) for address, text in lines]


def loop_with_most_wide_loads(code: list[Instruction]) -> list[Instruction]:
    loops = []
    for last, instruction in enumerate(code):
        if instruction.target is not None and instruction.target < instruction.address:
            first = next(i for i, c in enumerate(code) if c.address == instruction.target)
            loops.append(code[first : last + 1])
    return max(loops, key=lambda loop: (sum(c.is_wide_load() for c in loop), -len(loop)))


def shortest_turn(loop: list[Instruction]) -> list[Instruction]:
    """What one turn of a loop executes when it takes every shortcut, as it does in plain rows."""
    position = {instruction.address: i for i, instruction in enumerate(loop)}
    best: list[tuple[int, int]] = [(1, len(loop))] * len(loop)  # (instructions to the end, next)
    for i in reversed(range(len(loop) - 1)):
        target = position.get(loop[i].target, 0)
        ways = [target] if target > i else []
        if loop[i].is_conditional or not ways:
            ways.append(i + 1)
        best[i] = min((1 + best[way][0], way) for way in ways)
    path, i = [], 0
    while i < len(loop):
        path.append(loop[i])
        i = best[i][1]
    return path


@needs_nvcc
@pytest.mark.skipif(find_disassembler() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
@pytest.mark.parametrize(
    "loss, grad, most", [(True, False, 23), (False, True, 23), (True, True, 30)]
)
def test_inner_loop_of_focal_loss(hopper, dtype, loss, grad, most):
    """2 special functions and few instructions per element; 16-byte accesses, two under way."""
    folder, _ = hopper
    kernel = f"focal_kernelI{dtype}Li2ELb{loss:d}ELb{grad:d}E"
    code = disassemble(folder / "sigmoid_focal_loss.o", kernel)
    path = shortest_turn(loop_with_most_wide_loads(code))
    texts = [instruction.text for instruction in path]
    elements = 2 * 8  # rows of a turn, elements of a row
    assert sum("MUFU" in text for text in texts) == 2 * elements
    assert len(texts) <= most * elements
    assert not any("CALL" in text for text in texts)
    first_use = next(i for i, text in enumerate(texts) if "MUFU" in text)
    assert sum(instruction.is_wide_load() for instruction in path[:first_use]) == 2
    stores = sum("STG" in text and ".128" in text for text in texts)
    assert stores == (2 if grad else 0)


@needs_nvcc
@pytest.mark.skipif(find_disassembler() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
@pytest.mark.parametrize("kernel", ["scan", "collect"])
def test_scan_of_logits(hopper, dtype, kernel):
    """Four 16-byte loads under way before the first is looked at; few instructions per logit."""
    folder, _ = hopper
    code = disassemble(folder / "select_candidates.o", f"{kernel}_kernelI{dtype}E")
    first, *_, last = wide = [i for i, c in enumerate(code) if c.is_wide_load()]
    assert len(wide) == 4
    assert not any("FSETP" in c.text for c in code[first:last])
    end = next(i for i in range(last, len(code)) if "BAR." in code[i].text)
    logits = 4 * 8
    assert sum("FSETP" in c.text for c in code[last:end]) == logits
    assert end - first <= 8 * logits
