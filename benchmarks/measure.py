"""Measures a function and its peers: time, memory, launches, and share of the copy bandwidth."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fcos_d2.collect_env import cpu_name

RUNS = {"cpu": 41, "cuda": 200}
FEWEST, SECONDS = 3, 4.0  # per contender; slow peers run fewer than RUNS times
FLUSH_BYTES = 256 * 2**20  # more than the last-level cache of any GPU holds
SPIN_CYCLES = 4_000_000  # about 2 ms, during which the host queues launches


class Row(NamedTuple):
    """One line of the table."""

    op: str
    workload: str
    what: str
    milliseconds: float
    ratio: float  # to ours; above 1 is slower than ours
    bandwidth: float | None  # bytes that must be moved / time, as a share of the copy bandwidth
    megabytes: float  # peak memory beyond the inputs
    launches: int | None  # of kernels and copies; None on a CPU
    syncs: int | None  # host synchronizations; None on a CPU
    host_milliseconds: float | None  # until the call returns; None on a CPU


def compare(
    op: str,
    workload: str,
    contenders: dict[str, Callable],
    device: torch.device,
    floor_bytes: float | None,
) -> list[Row]:
    """Measures all contenders in turn, so that drift affects them alike; returns their rows.

    A contender runs twice per turn, and the second run counts, so that none pays for memory that
    another one released. The first contender is ours, as are all whose names start with "ours".
    Peers that fail are reported and left out. ``floor_bytes`` is what any implementation must read
    and write; None if arithmetic dominates.
    """
    alive = {}
    for name, function in contenders.items():
        try:
            function()
            function()
            alive[name] = function
        except Exception as error:  # some peers do not support all workloads
            if name.startswith("ours"):
                raise
            print(f"{op}, {workload}: {name} fails: {type(error).__name__}: {error}"[:200])
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(RUNS[device.type]):
        for name, function in alive.items():
            if len(times[name]) < FEWEST or sum(times[name]) < SECONDS:
                function()
                times[name].append(_seconds(function, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = next(iter(medians.values()))
    rows = [
        Row(
            op,
            workload,
            name,
            median * 1e3,
            median / ours,
            floor_bytes and floor_bytes / median / copy_bandwidth(device),
            _peak_megabytes(alive[name], device),
            *_launches_and_syncs(alive[name], device),
            _host_milliseconds(alive[name], device),
        )
        for name, median in medians.items()
    ]
    for row in rows:
        print(format_row(row), flush=True)
    return rows


def graph_of(function: Callable, device: torch.device) -> dict[str, Callable]:
    """Returns ``function`` as a CUDA graph, to measure it without launch overhead; only on a GPU.

    The graph keeps its own memory as long as it lives, which the table does not include.
    """
    if device.type != "cuda":
        return {}
    graph = functools.cache(lambda: captured(function)[0])  # of the first call
    return {"CUDA graph of ours": lambda: graph().replay()}


def captured(call: Callable) -> tuple[torch.cuda.CUDAGraph, object]:
    """Captures ``call`` as a CUDA graph; every replay overwrites the returned result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # loads the kernels, which a graph cannot capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Measures bytes per second, read and written, when copying a large tensor."""
    source = torch.ones(FLUSH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(_seconds(lambda: target.copy_(source), device) for _ in range(15))
    return 2 * FLUSH_BYTES / seconds


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device=device)


def _seconds(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        # Flush the cache, so that inputs come from memory; reads leave nothing to write back.
        _flush_buffer(device).sum()
        # Our kernels take less time than their launches from Python. The GPU spins until all
        # launches are queued, so that the time does not include waiting for the host.
        torch.cuda._sleep(SPIN_CYCLES)
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
    """Returns the peak memory of the function beyond what was allocated before."""
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


def _launches_and_syncs(function: Callable, device: torch.device) -> tuple[int | None, int | None]:
    """Counts kernels, copies and fills on the GPU, and host synchronizations."""
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        function()
    events = trace.events()
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    # The profiler itself synchronizes once at the end, with cudaDeviceSynchronize.
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize")
    return launches, sum(event.name in waits for event in events)


def _host_milliseconds(function: Callable, device: torch.device) -> float | None:
    """Measures the time until the call returns on an idle GPU: the cost of the launches."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(11):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3


COLUMNS = (
    "op",
    "workload",
    "what",
    "ms (median)",
    "ours is faster by",
    "of copy bandwidth",
    "peak extra MiB",
    "launches",
    "host syncs",
    "host ms",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def format_row(row: Row) -> str:
    """Formats a row as a line of a Markdown table."""
    ratio = "" if row.what == "ours" else f"{row.ratio:.1f}x"
    counts = ("-" if count is None else str(count) for count in (row.launches, row.syncs))
    cells = (
        row.op,
        row.workload,
        row.what,
        f"{row.milliseconds:.3f}",
        ratio,
        "-" if row.bandwidth is None else f"{row.bandwidth:.1%}",
        f"{row.megabytes:.1f}",
        *counts,
        "-" if row.host_milliseconds is None else f"{row.host_milliseconds:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def machine_name(device: torch.device) -> str:
    """Returns a file name for this machine's results."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu-{cpu_name()}-{torch.get_num_threads()}-threads"
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


def describe_machine(device: torch.device) -> str:
    """Describes the hardware and software of the measurements."""
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    capability = "" if device.type == "cuda" else f", {torch.backends.cpu.get_cpu_capability()}"
    return (
        f"{where}{capability}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )
