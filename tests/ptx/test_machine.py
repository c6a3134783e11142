"""Tests of the interpreter: correct kernels run as on a GPU, and faults are reported."""

import ctypes
import functools
import re

import pytest
import torch

from fcos_d2.ops import sigmoid_focal_loss
from tests.ops.backends import use

from . import ptx

pytestmark = pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))

THREADS = 64  # per block


@functools.cache
def machine() -> ctypes.CDLL:
    source = ptx.HERE / "faults.cu"
    library = ptx.prepare(ptx.build("faults", (source,)), [ptx.ptx_of(source)])
    library.run_kernel.restype = ctypes.c_char_p
    library.run_kernel.argtypes = [ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 4]
    return library


def run(name: str, blocks: int = 1, seed: int = 0) -> tuple[str, list[int]]:
    """Runs a kernel of faults.cu; returns (error message, output of every thread)."""
    count, gap = blocks * THREADS, 64
    memory = (ctypes.c_int * (4 * (count + gap)))()  # gaps detect overflows
    step = ctypes.sizeof(memory) // 4
    begin, given, scratch, counter = range(ctypes.addressof(memory) + 2 * gap, 2**64, step)[:4]
    out = (ctypes.c_int * count).from_address(begin)
    (ctypes.c_int * count).from_address(given)[:] = range(count)
    library = machine()
    library.ptx_add_tensor(given, 4 * count, True, True)
    library.ptx_add_tensor(begin, 4 * count, False, False)
    library.ptx_add_tensor(scratch, 4 * count, name == "chained_blocks", False)
    library.ptx_add_tensor(counter, 4, True, False)
    with ptx.schedule(seed, library):
        message = library.run_kernel(name.encode(), blocks, begin, given, counter, scratch).decode()
    unwritten = library.ptx_count_unwritten(begin, 4 * count)
    library.ptx_forget_tensors()
    if message == "no error" and unwritten > 0:
        message = f"{unwritten} bytes were left unwritten"
    return message, list(out)


# Expected messages, as regular expressions.
FAULTS = {
    "barrier_in_one_warp": "divergent barrier: 32 threads have exited, 32 threads wait at ",
    "different_barriers": "divergent barrier: 32 threads wait at .*, 32 threads wait at ",
    "shuffle_in_divergent_code": "the mask contains lanes that have exited or do not exist",
    "mask_without_executing_lane": "the mask lacks the executing lane",
    "shuffle_from_lane_outside_mask": "shuffle reads a lane outside the mask",
    "race_between_lanes": "data race with a (write|read) by thread ",
    "race_between_warps": "data race with a (write|read) by thread ",
    "write_after_read_race": "data race with a (write|read) by thread ",
    "shared_array_overflow": "4-byte access outside all shared variables",
    "dynamic_shared_overflow": "4-byte access outside all shared variables",
    "global_overflow": "4-byte access outside all tensors",
    "global_underflow": "4-byte access outside all tensors",
    "null_pointer": "4-byte access through a null pointer",
    "misaligned_vector": "misaligned 16-byte access",
    "write_to_input": "write to an input tensor",
    "uninitialized_shared": "use of an uninitialized value",
    "uninitialized_global": "use of an uninitialized value",
    "stale_read_only_cache": "ld.global.nc of memory that this kernel has written",
    "livelock": "livelock: spins on memory that no thread writes",
    "exceeds_launch_bounds": "more threads than __launch_bounds__",
}
FAULTS_BETWEEN_BLOCKS = {
    "race_between_blocks": "data race with a write by thread .* of block ",
    "plain_read_of_atomic": "data race with a (write|read) by thread .* of block ",
    "missing_release_fence": "data race with a write by thread .* of block ",
    "missing_acquire_fence": "data race with a write by thread .* of block ",
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_within_a_block_is_reported(name, seed):
    message, _ = run(name, seed=seed)
    assert re.match(FAULTS[name], message)
    if name != "exceeds_launch_bounds":
        location = r"; `.+` \(faults\.ptx:\d+, .*faults\.cu:\d+\), thread \d+ of block 0, "
        assert re.search(location, message), message


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAULTS_BETWEEN_BLOCKS)
def test_fault_between_blocks_is_reported(name, seed):
    message, _ = run(name, 3, seed)
    assert re.match(FAULTS_BETWEEN_BLOCKS[name], message), message


def test_failed_assertion_is_the_error_message():
    assert run("failed_assertion")[0] == "threadIdx.x != 5"
    assert run("collectives")[0] == "no error"


def test_unwritten_output_is_reported():
    assert run("unwritten_output", 2)[0] == "8 bytes were left unwritten"


@pytest.mark.parametrize("seed", range(6))
def test_correct_kernels_run_under_any_schedule(seed):
    assert run("collectives", 2, seed) == ("no error", [1] * 2 * THREADS)
    sums = [sum(i if i % 3 == 0 else 1 for i in range(n + 1)) for n in range(THREADS)]
    assert run("divergent_loop", 1, seed) == ("no error", [sums[i ^ 1] for i in range(THREADS)])
    assert run("atomics", 1, seed)[1][:3] == [2016, 0, 63]
    assert run("chained_blocks", 9, seed) == ("no error", [1] * 9 * THREADS)


@pytest.mark.parametrize("seed", range(6))
def test_last_block_reads_writes_released_by_fences(seed):
    message, out = run("last_block", 5, seed)
    assert message == f"{4 * 4 * THREADS} bytes were left unwritten"  # by the other blocks
    assert out[:THREADS] == [sum(range(i, 5 * THREADS, THREADS)) for i in range(THREADS)]


def test_failed_launch_does_not_affect_later_launches():
    logits, labels = torch.zeros(3, 1, 30, 30), torch.zeros(3, 900, dtype=torch.int32)
    labels[2, 899] = 7  # out of range: fails an assertion in the last block
    tiny = [logits[:1, :, :1, :1]], labels[:1, :1]
    with use(ptx.overloads()), ptx.schedule(1):
        expected = sigmoid_focal_loss(*tiny, alpha=0.25, gamma=2.0)
        for _ in range(10):
            with pytest.raises(RuntimeError):
                sigmoid_focal_loss([logits], labels, alpha=0.25, gamma=2.0)
        for _ in range(4096):  # until the tickets of all failed launches are reused
            assert torch.equal(sigmoid_focal_loss(*tiny, alpha=0.25, gamma=2.0), expected)
