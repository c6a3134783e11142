"""Calls on CUDA streams, and without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def forbidden_to_wait() -> Iterator[None]:
    """Makes it an error that the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def results_on_streams(calls: Sequence[Callable], rounds: int) -> Iterator[list]:
    """The results of all calls, round by round; each call has a stream of its own."""
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(rounds):
        results = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(call())
        torch.cuda.synchronize()
        yield results
