"""Tests that the oldest torch with the stable ABI loads a library built with a newer one.

Set ``FCOS_D2_OLDEST_TORCH`` to the path of a Python with torch 2.10, numpy, pytest and hypothesis.
CI also builds the library with that torch.
"""

import os
import re

import pytest

from tests import native
from tests.ops import subprocesses

OLDEST_PYTHON = os.environ.get("FCOS_D2_OLDEST_TORCH")
VERSIONS = "import torch, fcos_d2.ops; print(torch.__version__, fcos_d2.ops.build_info()['torch'])"


@pytest.mark.skipif(OLDEST_PYTHON is None, reason="FCOS_D2_OLDEST_TORCH is not set")
@pytest.mark.skipif(not subprocesses.BUILT.exists(), reason="nothing is compiled")
def test_library_passes_the_op_tests_on_the_oldest_torch(tmp_path):
    folder = subprocesses.make_package(tmp_path, subprocesses.BUILT)
    versions = subprocesses.run_python(folder, "-W", "ignore", "-c", VERSIONS, python=OLDEST_PYTHON)
    running, built_with = versions.stdout.split()
    assert running.startswith("2.10.") and not built_with.startswith("2.10."), versions.stderr
    done = subprocesses.run_python(
        folder, "-W", "ignore", "-c", subprocesses.RUN_TESTS, "-m", "not slow", "-k", "compiled",
        str(native.ROOT / "tests" / "ops"), python=OLDEST_PYTHON,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 200
