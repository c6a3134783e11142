"""Builds C++ for the tests incrementally, with ninja."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++")
TORCH = Path(torch.__file__).parent
LINK_TORCH = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]


def missing() -> str | None:
    """Returns the reason why C++ cannot be built, or None."""
    has_ninja = importlib.util.find_spec("ninja") is not None
    return None if has_ninja and shutil.which(COMPILER) else "needs a C++ compiler and ninja"


def load_setup() -> ModuleType:
    """Loads setup.py as a module; HOME is the CUDA_HOME that it sets."""
    spec = importlib.util.spec_from_file_location("fcos_d2_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [*sys.path]):
        spec.loader.exec_module(module)
        module.HOME = os.environ.get("CUDA_HOME")
    return module


setup_py = functools.cache(load_setup)


def compile_command(torch_folder: Path = TORCH) -> list[str]:
    """Returns setup.py's C++ compile command, without the source file."""
    return [COMPILER, "-fPIC", *setup_py().FLAGS, f"-isystem{torch_folder / 'include'}"]


def build(output: Path, commands: dict[Path, list[str]], link: list[str]) -> Path:
    """Compiles with ``commands`` (by object file), and links. Appends "-o FILE" to each command."""
    lines = ["rule run", "  command = $arguments -o $out"]
    lines += ["rule compile", "  command = $arguments -MMD -MF $out.d -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    for target, command in commands.items():
        lines += [f"build {_escape(target)}: compile", f"  arguments = {_join(command)}"]
    lines += [f"build {_escape(output)}: run {' '.join(map(_escape, commands))}"]
    lines += [f"  arguments = {_join([*link[:1], *map(str, commands), *link[1:]])}"]
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".ninja")
    file.write_text("\n".join(lines) + "\n")
    ninja = [sys.executable, "-m", "ninja", "-f", file.name]
    done = subprocess.run(ninja, cwd=output.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return output


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _join(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")
