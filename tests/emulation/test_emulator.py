"""The emulator itself: it does what CUDA does, and finds what is wrong in wrong kernels."""

import ctypes

import pytest

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

THREADS = 64
GARBAGE = -1  # what shared memory holds before it is written


def run(name: str) -> tuple[str, list[int]]:
    """(CUDA's message, output of every thread) of a kernel of faults.cu."""
    out = (ctypes.c_int * THREADS)(*[7] * THREADS)
    run_fault = ctypes.CDLL(str(emulated.build("faults"))).run_fault
    run_fault.restype = ctypes.c_char_p
    return run_fault(name.encode(), out).decode(), list(out)


@pytest.mark.parametrize("number", range(5))
def test_barriers_warps_and_atomics_work_in_any_order_of_threads(number):
    with emulated.schedule(number, "faults"):
        assert run("warp_functions") == ("no error", [1] * THREADS)
        assert run("shared_memory") == ("no error", [2016] * THREADS)
        assert run("atomics")[1][:3] == [2016, 0, 63]


def test_barrier_that_some_threads_do_not_reach_is_named():
    message, _ = run("barrier_not_reached_by_all")
    assert message.startswith("divergent barrier: 32 threads have exited, 32 threads wait at ")
    assert "faults.cu:" in message


def test_threads_at_different_barriers_are_named():
    assert run("different_barriers")[0].count("32 threads wait at ") == 2


def test_shuffle_that_some_lanes_do_not_reach_is_named():
    message, _ = run("shuffle_without_all_lanes")
    assert message.startswith("divergent barrier: 32 threads have exited")


@pytest.mark.parametrize("fault", ["race", "race_of_warps"])
def test_missing_barrier_shows_in_some_order_of_threads(fault):
    outputs = []
    for number in range(10):
        with emulated.schedule(number, "faults"):
            outputs.append(run(fault)[1])
    assert any(out != outputs[0] for out in outputs)


def test_shared_memory_starts_as_garbage():
    assert run("reads_garbage")[1] == [GARBAGE] * THREADS


def test_failed_assertion_ends_the_kernel_with_its_message():
    assert run("refuses")[0] == "thread 5 is refused"
    assert run("shared_memory")[0] == "no error"


def test_outputs_are_left_alone_by_a_kernel_that_writes_nothing():
    assert run("writes_nothing") == ("no error", [7] * THREADS)
