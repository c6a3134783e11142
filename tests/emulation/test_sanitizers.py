"""The emulated kernels under AddressSanitizer and UBSan, in processes of their own."""

import os
import subprocess
import sys

import pytest

from . import emulated

pytestmark = [
    pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing())),
    pytest.mark.skipif(emulated.SANITIZED, reason="runs in an ordinary process"),
]

RUN_FAULT = """
import ctypes, sys
allocate = ctypes.CDLL(None).malloc
allocate.restype = ctypes.c_void_p
library = ctypes.CDLL(sys.argv[1])
library.run_fault(sys.argv[2].encode(), ctypes.c_void_p(allocate(64 * 4)))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Runs Python with the sanitizers loaded before anything else."""
    find = [emulated.COMPILER, "-print-file-name=libasan.so"]
    asan = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip("needs libasan")
    environment = {
        **os.environ,
        # The C++ library too: AddressSanitizer looks for its functions as soon as it starts.
        "LD_PRELOAD": f"{asan} libstdc++.so.6",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FCOS_D2_EMULATION": "sanitized",
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=emulated.ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kernel, finding",
    [
        ("past_shared_array", "global-buffer-overflow"),
        ("past_dynamic_shared", "heap-buffer-overflow"),
        ("past_global_array", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_fault_is_found(kernel, finding):
    done = run("-c", RUN_FAULT, str(emulated.build("faults", sanitized=True)), kernel)
    assert done.returncode != 0 and finding in done.stderr, done.stderr[-2000:]
    assert "faults.cu" in done.stderr


def test_sound_kernel_passes():
    done = run("-c", RUN_FAULT, str(emulated.build("faults", sanitized=True)), "shared_memory")
    assert done.returncode == 0, done.stderr[-2000:]


def test_all_emulated_tests_and_random_cases_pass_under_the_sanitizers():
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-k", "emulat"]
    done = run("-m", "pytest", *options, "tests/emulation", "tests/ops/test_properties.py")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
