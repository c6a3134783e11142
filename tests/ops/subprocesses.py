"""Runs Python with a copy of ``fcos_d2.ops`` that has another compiled library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fcos_d2.ops import _library

ROOT = Path(__file__).parents[2]
BUILT = _library._FOLDER / "_C.so"


def make_package(folder: Path, library: Path | None) -> Path:
    """Creates the package ``folder / "fcos_d2"`` with only the ops, and ``library`` as _C.so."""
    package = folder / "fcos_d2"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    for name, target in {"ops": ROOT / "fcos_d2" / "ops", "_C.so": library}.items():
        (package / name).unlink(missing_ok=True)
        if target is not None:
            (package / name).symlink_to(target)
    return folder


def run_python(
    folder: Path, *arguments: str, python: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    """Runs Python so that ``import fcos_d2`` finds the package in ``folder``."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("FCOS_D2_STRICT", "PYTHONPATH")}
    return subprocess.run(
        [str(python), *arguments],
        cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


# Runs the tests in sys.argv on the ops of the current folder, which it imports before pytest puts
# the source folder first on the path.
RUN_TESTS = """
import sys, pytest, fcos_d2.ops
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
