"""The interpreter itself: it behaves like CUDA, and detects faults in faulty kernels."""

import ctypes
import functools
import re

import pytest
import torch

from fcos_d2.ops import sigmoid_focal_loss
from tests.ops.backends import use

from . import ptx

pytestmark = pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing()))

THREADS = 64  # of a block


@functools.cache
def machine() -> ctypes.CDLL:
    source = ptx.HERE / "faults.cu"
    library = ptx.prepare(ptx.build("faults", (source,)), [ptx.ptx_of(source)])
    library.run_kernel.restype = ctypes.c_char_p
    library.run_kernel.argtypes = [ctypes.c_char_p, ctypes.c_int, *[ctypes.c_void_p] * 4]
    return library


def run(name: str, blocks: int = 1, seed: int = 0) -> tuple[str, list[int]]:
    """(error message, output of every thread) of a kernel of faults.cu."""
    count, gap = blocks * THREADS, 64
    memory = (ctypes.c_int * (4 * (count + gap)))()  # gaps belong to no tensor
    step = ctypes.sizeof(memory) // 4
    begin, given, scratch, counter = range(ctypes.addressof(memory) + 2 * gap, 2**64, step)[:4]
    out = (ctypes.c_int * count).from_address(begin)
    (ctypes.c_int * count).from_address(given)[:] = range(count)
    library = machine()
    library.ptx_add_tensor(given, 4 * count, True, True)
    library.ptx_add_tensor(begin, 4 * count, False, False)
    library.ptx_add_tensor(scratch, 4 * count, name == "blocks_in_a_row", False)
    library.ptx_add_tensor(counter, 4, True, False)
    with ptx.schedule(seed, library):
        message = library.run_kernel(name.encode(), blocks, begin, given, counter, scratch).decode()
    unwritten = library.ptx_count_unwritten(begin, 4 * count)
    library.ptx_forget_tensors()
    if message == "no error" and unwritten > 0:
        message = f"{unwritten} bytes were left unwritten"
    return message, list(out)


# Faults and the interpreter's messages.
FAULTS = {
    "barrier_not_reached_by_all": "divergent barrier: 32 threads have exited, 32 threads wait at ",
    "different_barriers": "divergent barrier: 32 threads wait at .*, 32 threads wait at ",
    "shuffle_without_all_lanes": "its mask has lanes that have exited or never were",
    "lane_outside_its_mask": "a lane outside its own mask",
    "shuffle_from_outside_the_mask": "takes the value of a lane outside the mask",
    "race_of_lanes": "race: not ordered after a (write|read) of thread ",
    "race_of_warps": "race: not ordered after a (write|read) of thread ",
    "write_after_read": "race: not ordered after a (write|read) of thread ",
    "past_shared_array": "4 bytes outside of every shared variable",
    "past_dynamic_shared": "4 bytes outside of every shared variable",
    "past_global_array": "4 bytes outside of every tensor",
    "before_global_array": "4 bytes outside of every tensor",
    "null_pointer": "4 bytes at a null pointer",
    "misaligned": "misaligned address of 16 bytes",
    "writes_an_input": "a write to an input",
    "uses_garbage_in_shared": "uses what was read before it was written",
    "uses_garbage_in_global": "uses what was read before it was written",
    "reads_stale_cache": "reads by ld.global.nc what this kernel has written",
    "waits_for_ever": "it reads for ever, and nobody writes",
    "too_many_threads": "more threads than __launch_bounds__",
}
FAULTS_OF_BLOCKS = {
    "race_of_blocks": "race: not ordered after a write of thread .* of block ",
    "plain_beside_atomic": "race: not ordered after a (write|read) of thread .* of block ",
    "no_release": "race: not ordered after a write of thread .* of block ",
    "no_acquire": "race: not ordered after a write of thread .* of block ",
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_block_is_found(name, seed):
    message, _ = run(name, seed=seed)
    assert re.match(FAULTS[name], message)
    if name != "too_many_threads":
        where = r"; `.+` \(faults\.ptx:\d+, .*faults\.cu:\d+\), thread \d+ of block 0, "
        assert re.search(where, message), message


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAULTS_OF_BLOCKS)
def test_fault_between_blocks_is_found(name, seed):
    message, _ = run(name, 3, seed)
    assert re.match(FAULTS_OF_BLOCKS[name], message), message


def test_failed_assertion_is_the_message_of_the_error():
    assert run("refuses")[0] == "threadIdx.x != 5"
    assert run("warp_functions")[0] == "no error"


def test_unwritten_output_is_found():
    assert run("leaves_output_unwritten", 2)[0] == "8 bytes were left unwritten"


@pytest.mark.parametrize("seed", range(6))
def test_sound_kernels_run_in_any_order_of_blocks_and_threads(seed):
    assert run("warp_functions", 2, seed) == ("no error", [1] * 2 * THREADS)
    sums = [sum(i if i % 3 == 0 else 1 for i in range(n + 1)) for n in range(THREADS)]
    assert run("lanes_that_part", 1, seed) == ("no error", [sums[i ^ 1] for i in range(THREADS)])
    assert run("atomics", 1, seed)[1][:3] == [2016, 0, 63]
    assert run("blocks_in_a_row", 9, seed) == ("no error", [1] * 9 * THREADS)


@pytest.mark.parametrize("seed", range(6))
def test_last_block_reads_what_fences_have_released(seed):
    message, out = run("last_block", 5, seed)
    assert message == f"{4 * 4 * THREADS} bytes were left unwritten"  # by the other blocks
    assert out[:THREADS] == [sum(range(i, 5 * THREADS, THREADS)) for i in range(THREADS)]


def test_failed_launch_leaves_no_trace_in_later_ones():
    logits, labels = torch.zeros(3, 1, 30, 30), torch.zeros(3, 900, dtype=torch.int32)
    labels[2, 899] = 7  # out of range: an assertion fails in the last block
    tiny = [logits[:1, :, :1, :1]], labels[:1, :1]
    with use(ptx.overloads()), ptx.schedule(1):
        expected = sigmoid_focal_loss(*tiny, alpha=0.25, gamma=2.0)
        for _ in range(10):
            with pytest.raises(RuntimeError):
                sigmoid_focal_loss([logits], labels, alpha=0.25, gamma=2.0)
        for _ in range(4096):  # until the ticket of every failed launch is taken again
            assert torch.equal(sigmoid_focal_loss(*tiny, alpha=0.25, gamma=2.0), expected)
