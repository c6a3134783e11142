"""Builds csrc/ into shared libraries inside fcos_d2/; pyproject.toml says everything else.

The libraries hold no Python API: they register operators when `torch.ops.load_library` opens them.
They are built against the torch of the environment that is installed into; none is downloaded.

    pip install -e .                      the package with its libraries
    python setup.py build_ext --inplace   the libraries again, only what changed

The CUDA library is built where there are nvcc and a torch with CUDA, GPU or not: it may be for an
image, or for other nodes of a cluster. The environment can say more:

    FCOS_D2_CUDA=1          what is missing for it is an error
    FCOS_D2_CUDA=0          do not build it
    TORCH_CUDA_ARCH_LIST    build it for these GPUs, like "8.0;9.0+PTX"; otherwise for the one of
                            this machine, or without one for all that torch supports (minutes)
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# -Wno-psabi: vectors never cross the border of a file, so their calling convention is ours.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wno-psabi"]
# The oldest torch (2.10) whose stable ABI the libraries use; every later one loads them too.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"

TORCH_MISSING = """

    fcos_d2 is built against the torch of your environment, which has none. Type:

        pip install torch torchvision
        pip install -e .

    uv hides an installed torch; then it is: uv pip install --no-build-isolation -e .
"""
NVCC_MISSING = """

    fcos_d2: the CUDA library needs nvcc, which is neither on PATH nor in CUDA_HOME. Type:

        pip install "cuda-toolkit[nvcc,cudart,cccl]=={torch}.*"
"""
NO_CUDA_IN_TORCH = "fcos_d2: the CUDA library needs a torch with CUDA, this is torch {torch}"
OTHER_CUDA = (
    "fcos_d2: nvcc is of CUDA {nvcc} but torch was built with CUDA {torch}: install CUDA toolkit "
    "{torch} and point CUDA_HOME to it, or install a torch for CUDA {nvcc}"
)
COMPILER_MISSING = "fcos_d2: no C++ compiler ({}), nothing is built: the reference ops will be used"


def find_torch() -> Path:
    """Returns the folder of the environment's torch, without importing it."""
    # pip builds with the environment's interpreter but hides its packages. At the end of the path
    # they do not get in front of the setuptools that pip chose.
    if importlib.util.find_spec("torch") is None:
        sys.path += [*site.getsitepackages(), site.getusersitepackages()]
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(TORCH_MISSING)
    return Path(spec.origin).parent


def read_torch_version(torch: Path) -> str:
    """Returns what `torch.__version__` would say."""
    return re.findall(r"(?m)^__version__ = '(.+)'", (torch / "version.py").read_text())[0]


def is_current(target: Path, command: list[str]) -> bool:
    """Says whether this command made the target, from files that have not changed since."""
    record, depfile = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not target.exists() or not record.exists() or record.read_text() != shlex.join(command):
        return False
    made = target.stat().st_mtime
    listed = depfile.read_text().replace("\\\n", " ").partition(":")[2]
    sources = map(Path, shlex.split(listed))
    return all(source.exists() and source.stat().st_mtime <= made for source in sources)


def compile_source(
    source: str, target: Path, arguments: list[str], compiler: list[str] | None = None
) -> None:
    """Compiles one file, unless that was done before."""
    depfile, record = target.with_suffix(".d"), target.with_suffix(".cmd")
    command = [*(compiler or COMPILER), *arguments, "-MMD", "-MF", str(depfile)]
    command += ["-c", source, "-o", str(target)]
    if is_current(target, command):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted compiler may leave half a file: only a finished one has a record.
    record.unlink(missing_ok=True)
    subprocess.run(command, check=True)
    record.write_text(shlex.join(command))


class BuildLibraries(build_ext):
    """Compiles in parallel and keeps the objects in build/, whichever tool started the build."""

    def get_ext_filename(self, fullname: str) -> str:
        """Names a library without a Python version: it does not depend on one."""
        return os.path.join(*fullname.split(".")) + ".so"

    def compile_command(self, ext: Extension, source: str) -> tuple[list[str], list[str]]:
        """Returns the arguments for one source and the compiler that takes them."""
        if source.endswith(".cu"):
            return ext.nvcc_args, [ext.nvcc]
        return ext.extra_compile_args, COMPILER

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links one library."""
        folder = Path("build") / ext.name
        objects = [folder / Path(source).with_suffix(".o") for source in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(compile_source, source, target, *self.compile_command(ext, source))
                for source, target in zip(ext.sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        inputs = [*map(str, objects), *ext.extra_link_args]
        subprocess.run([*COMPILER, "-shared", *inputs, "-o", str(output)], check=True)


def describe_library(name: str, sources: list[Path], torch: Path) -> Extension:
    """Describes fcos_d2/<name>.so."""
    return Extension(
        f"fcos_d2.{name}",
        sources=[source.as_posix() for source in sources],
        # All of it, so that a source distribution made without CUDA can be built with it.
        depends=[path.as_posix() for path in sorted(CSRC.rglob("*.*")) if path.is_file()],
        extra_compile_args=[
            *FLAGS,
            TORCH_TARGET,
            f'-DFCOS_D2_TORCH_VERSION="{read_torch_version(torch)}"',
            f'-DFCOS_D2_FLAGS="{shlex.join(FLAGS)}"',
            f"-isystem{torch / 'include'}",
        ],
        # No rpath: when the library is opened, torch has long loaded its own.
        extra_link_args=[f"-L{torch / 'lib'}", "-ltorch_cpu"],
    )


def cpu_library(torch: Path) -> Extension:
    """Describes fcos_d2/_C.so."""
    sources = [CSRC / "bindings" / "cpu.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    return describe_library("_C", sources, torch)


# ---- CUDA ----


def find_nvcc() -> str | None:
    """Returns nvcc, of CUDA_HOME, of PATH, or of a toolkit that pip installed."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = [Path(path) for path in sys.path if path.endswith("site-packages")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes]
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found]
    candidates += [nvcc for path in packages for nvcc in sorted(path.glob("nvidia/cu*/bin/nvcc"))]
    for nvcc in candidates:
        if nvcc.is_file():
            return os.path.realpath(nvcc)  # nvcc looks for its parts beside itself
    return None


def run(*command: str) -> str:
    """Returns what a command printed, to either stream; nothing if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def read_cuda_version(torch: Path) -> str | None:
    """Returns what `torch.version.cuda` would say."""
    found = re.findall(r"(?m)^cuda\b.*= '(.+)'", (torch / "version.py").read_text())
    return found[0] if found else None


def find_toolkit(nvcc: str) -> Path:
    """Returns the folder with the headers and libraries that belong to nvcc."""
    # Only nvcc knows: it may be a script that starts another one.
    return Path(re.findall(r"(?m)^#\$ TOP=(.+)$", run(nvcc, "--dryrun", "-c", "x.cu"))[0]).resolve()


def visible_gpus() -> list[str]:
    """Lists the architectures of this machine's GPUs, such as 9.0."""
    output = run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return sorted(set(re.findall(r"(?m)^\d+\.\d+$", output)))


def torch_architectures(torch: Path) -> list[str]:
    """Lists the architectures that torch was built for, the newest with code for later ones."""
    code = f"import sys; sys.path.insert(0, {str(torch.parent)!r}); import torch; "
    code += "print(torch._C._cuda_getArchFlags())"
    flags = run(sys.executable, "-W", "ignore", "-c", code)
    numbers = sorted({int(number) for number in re.findall(r"\bsm_(\d+)\b", flags)})
    names = [f"{number // 10}.{number % 10}" for number in numbers]
    return [*names[:-1], *(f"{newest}+PTX" for newest in names[-1:])]


def gencode(nvcc: str, architectures: list[str]) -> list[str]:
    """Returns the options of nvcc for architectures such as 8.0 or 9.0+PTX, save unknown ones."""
    known = set(re.findall(r"compute_(\w+)", run(nvcc, "--list-gpu-arch")))
    options = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        if number.rstrip("af") not in known:
            continue
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def choose_architectures(nvcc: str, torch: Path) -> list[str]:
    """Returns the options of nvcc for the GPUs to build for."""
    wanted = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    wanted = [architecture for architecture in wanted if architecture]
    options = gencode(nvcc, wanted or visible_gpus() or torch_architectures(torch))
    if not options:
        known = " ".join(run(nvcc, "--list-gpu-arch").split())
        raise SystemExit(f"fcos_d2: {nvcc} builds for none of the GPUs asked for, but for {known}")
    return options


def cuda_obstacle(nvcc: str | None, torch: Path) -> str | None:
    """Returns why the CUDA library cannot be built, None where it can."""
    torch_cuda = read_cuda_version(torch)
    if torch_cuda is None:
        return NO_CUDA_IN_TORCH.format(torch=read_torch_version(torch))
    if nvcc is None:
        return NVCC_MISSING.format(torch=torch_cuda)
    version = re.findall(r"release (\d+\.\d+)", run(nvcc, "--version"))
    if not version or version[0].split(".")[0] != torch_cuda.split(".")[0]:
        return OTHER_CUDA.format(nvcc=version[0] if version else "unknown", torch=torch_cuda)
    return None


def cuda_library(nvcc: str, torch: Path) -> Extension:
    """Describes fcos_d2/_C_cuda.so."""
    toolkit = find_toolkit(nvcc)
    sources = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "bindings" / "cuda.cpp"]
    library = describe_library("_C_cuda", sources, torch)
    library.extra_compile_args += ["-DUSE_CUDA", f"-isystem{toolkit / 'include'}"]
    library.nvcc = nvcc
    library.nvcc_args = [
        "-std=c++20",
        "-O3",
        f"-ccbin={COMPILER[0]}",
        "-Xcompiler=-fPIC",
        *choose_architectures(nvcc, torch),
    ]
    # The runtime inside the library: whichever torch opens it need not bring the same one.
    folders = [toolkit / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    library.extra_link_args += [
        "-ltorch_cuda",
        *(f"-L{folder}" for folder in folders if folder.is_dir()),
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
    ]
    return library


def find_cuda_libraries(torch: Path) -> list[Extension]:
    """Lists the CUDA library if it can be built, GPU or not."""
    choice = os.environ.get("FCOS_D2_CUDA", "auto")
    if choice == "0":
        return []
    nvcc = find_nvcc()
    obstacle = cuda_obstacle(nvcc, torch)
    if obstacle is None:
        return [cuda_library(nvcc, torch)]
    if choice == "1":
        raise SystemExit(obstacle)
    if nvcc or os.environ.get("TORCH_CUDA_ARCH_LIST") or visible_gpus():
        print(f"{obstacle.strip()}\nfcos_d2: built without CUDA", file=sys.stderr)
    return []


def find_libraries() -> list[Extension]:
    """Lists the libraries that can be built here."""
    torch = find_torch()
    if shutil.which(COMPILER[0]) is None:
        print(COMPILER_MISSING.format(COMPILER[0]), file=sys.stderr)
        return []
    return [cpu_library(torch), *find_cuda_libraries(torch)]


if __name__ == "__main__":
    setup(ext_modules=find_libraries(), cmdclass={"build_ext": BuildLibraries})
