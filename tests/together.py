"""Calls that run at the same time, each in a thread of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier


def run_together(calls: Sequence[Callable], rounds: int = 1) -> list[list]:
    """Results of every call, each run ``rounds`` times; all threads start in the same moment."""
    start = Barrier(len(calls), timeout=60)  # seconds, then all fail instead of waiting for one

    def repeat(call: Callable) -> list:
        start.wait()
        return [call() for _ in range(rounds)]

    with _eager_threads(), ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(repeat, calls))


@contextmanager
def _eager_threads() -> Iterator[None]:
    """Lets threads take turns a thousand times as often as usual, so that races are lost."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
