"""Builds csrc/ into shared libraries inside fcos_d2/; pyproject.toml says everything else.

The libraries hold no Python API: they register operators when `torch.ops.load_library` opens them.
They are built against the torch of the environment that is installed into; none is downloaded.

    pip install -e .                      the package with its libraries
    python setup.py build_ext --inplace   the libraries again, only what changed
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
    sources = map(Path, shlex.split(depfile.read_text().replace("\\\n", " "))[1:])
    return all(source.exists() and source.stat().st_mtime <= made for source in sources)


def compile_source(source: str, target: Path, arguments: list[str]) -> None:
    """Compiles one file, unless that was done before."""
    depfile, record = target.with_suffix(".d"), target.with_suffix(".cmd")
    command = [*COMPILER, *arguments, "-MMD", "-MF", str(depfile), "-c", source, "-o", str(target)]
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

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links one library."""
        folder = Path("build") / ext.name
        objects = [folder / Path(source).with_suffix(".o") for source in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            arguments = [ext.extra_compile_args] * len(objects)
            list(pool.map(compile_source, ext.sources, objects, arguments))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        inputs = [*map(str, objects), *ext.extra_link_args]
        subprocess.run([*COMPILER, "-shared", *inputs, "-o", str(output)], check=True)


def cpu_library(torch: Path) -> Extension:
    """Describes fcos_d2/_C.so."""
    sources = [CSRC / "bindings" / "cpu.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    return Extension(
        "fcos_d2._C",
        sources=[source.as_posix() for source in sources],
        depends=[path.as_posix() for path in sorted(CSRC.rglob("*.[hi]*")) if path.is_file()],
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


def find_libraries() -> list[Extension]:
    """Lists the libraries that can be built here."""
    torch = find_torch()
    if shutil.which(COMPILER[0]) is None:
        print(COMPILER_MISSING.format(COMPILER[0]), file=sys.stderr)
        return []
    return [cpu_library(torch)]


if __name__ == "__main__":
    setup(ext_modules=find_libraries(), cmdclass={"build_ext": BuildLibraries})
