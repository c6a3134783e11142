"""Runs the tests of the ops on kernels with small tiles, lists and blocks."""

import os
import subprocess
import sys

import pytest

from tests import native

from . import ptx


@pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))
def test_kernels_with_small_tiles_pass_the_tests_of_the_ops():
    tests = ["tests/ops/test_properties.py", "tests/ops/test_kernels.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "ptx"]
        + ["-m", "not slow"],
        cwd=native.ROOT, env={**os.environ, ptx.SMALL_TILES: "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
