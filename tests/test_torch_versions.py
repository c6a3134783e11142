"""The oldest torch that the stable ABI serves: takes the library built here, and its own.

``FCOS_D2_OLDEST_TORCH=/path/to/python`` names an interpreter that has that torch already; otherwise
it is downloaded, 3 GB with the CUDA libraries it brings.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests import native
from tests.emulation import emulated
from tests.ops import subprocesses

OLDEST = ("torch==2.10.0", "torchvision==0.25.0")
# Of the test table; what it needs besides torch.
TESTED_WITH = ("hypothesis", "numpy", "pytest")
VERSIONS = "import torch, fcos_d2.ops; print(torch.__version__, fcos_d2.ops.build_info()['torch'])"


def make_environment(folder: Path) -> Path:
    """Installs the oldest torch into a new environment and returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir"]
    done = subprocess.run(
        [*install, *OLDEST, *TESTED_WITH], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"{OLDEST[0]} cannot be installed here: {' '.join(reason)}")
    return python


@pytest.fixture(scope="module")
def oldest_python(tmp_path_factory) -> Path:
    given = os.environ.get("FCOS_D2_OLDEST_TORCH")
    return Path(given) if given else make_environment(tmp_path_factory.mktemp("oldest"))


@pytest.mark.slow
@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("binding", ["cpu.cpp", "cuda.cpp"])
def test_bindings_compile_with_the_headers_of_the_oldest_torch(oldest_python, binding):
    where = [str(oldest_python), "-W", "ignore", "-c", "import torch; print(torch.__path__[0])"]
    torch = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    command = [*native.compile_command(Path(torch)), f"-I{emulated.HERE / 'include'}"]
    command += ["-fsyntax-only", str(native.ROOT / "csrc" / "bindings" / binding)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(not subprocesses.BUILT.exists(), reason="nothing is compiled")
@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch 2.10 has no wheels for it")
def test_one_build_passes_the_test_table_on_the_oldest_torch(oldest_python, tmp_path):
    folder = subprocesses.make_package(tmp_path, subprocesses.BUILT)
    versions = subprocesses.run_python(folder, "-W", "ignore", "-c", VERSIONS, python=oldest_python)
    running, built_with = versions.stdout.split()
    assert running.startswith("2.10.") and not built_with.startswith("2.10."), versions.stderr
    done = subprocesses.run_python(
        folder, "-W", "ignore", "-c", subprocesses.RUN_TESTS, "-m", "not slow", "-k", "compiled",
        str(native.ROOT / "tests" / "ops"), python=oldest_python,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 200
