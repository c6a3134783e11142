"""Measures a function beside its peers: time and peak extra memory."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

RUNS = {"cpu": 21, "cuda": 200}
SECONDS = 4.0  # a slow peer is not run RUNS times


class Row(NamedTuple):
    """One line of the table."""

    op: str
    workload: str
    what: str
    milliseconds: float
    ratio: float  # to ours; above 1 is slower than ours
    megabytes: float  # peak memory beyond the inputs


def compare(
    op: str, workload: str, contenders: dict[str, Callable], device: torch.device
) -> list[Row]:
    """Rows of all contenders, run in turn so that a drifting machine treats all alike.

    The first contender is ours. A contender that fails is left out, and said so.
    """
    alive = {}
    for name, function in contenders.items():
        try:
            function()
            function()
            alive[name] = function
        except Exception as error:  # a peer that cannot do the workload is a result too
            print(f"{op}, {workload}: {name} fails: {type(error).__name__}: {error}"[:200])
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(RUNS[device.type]):
        for name, function in alive.items():
            if sum(times[name]) < SECONDS:
                times[name].append(_seconds(function, device))
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    ours = next(iter(medians.values()))
    rows = [
        Row(op, workload, name, median, median / ours, _peak_megabytes(alive[name], device))
        for name, median in medians.items()
    ]
    for row in rows:
        print(format_row(row))
    return rows


def _seconds(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak_megabytes(function: Callable, device: torch.device) -> float:
    """Most memory that the function held at once beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


HEADER = (
    "| op | workload | what | ms (median) | ours is faster by | peak extra MiB |\n"
    "|---|---|---|---|---|---|"
)


def format_row(row: Row) -> str:
    """One line of a Markdown table."""
    ratio = "" if row.what == "ours" else f"{row.ratio:.1f}x"
    return (
        f"| {row.op} | {row.workload} | {row.what} | {row.milliseconds:.3f} | {ratio} "
        f"| {row.megabytes:.1f} |"
    )


def machine_name(device: torch.device) -> str:
    """A file name for this machine's results."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu-{_cpu_name()}-{torch.get_num_threads()}-threads"
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


def describe_machine(device: torch.device) -> str:
    """What the figures were measured on."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name()
    capability = "" if device.type == "cuda" else f", {torch.backends.cpu.get_cpu_capability()}"
    return (
        f"{where}{capability}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
