"""Calls functions in several threads at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier


def run_concurrently(calls: Sequence[Callable], rounds: int = 1) -> list[list]:
    """Runs each call ``rounds`` times in its own thread; all threads start together.

    Returns:
        The results of every call, by round.
    """
    start = Barrier(len(calls))

    def repeat(call: Callable) -> list:
        start.wait()
        return [call() for _ in range(rounds)]

    with _frequent_thread_switches(), ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(repeat, calls))


@contextmanager
def _frequent_thread_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
