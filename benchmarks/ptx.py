"""Counts PTX instructions of the standard workload: ``python -m benchmarks.ptx``.

Needs no GPU: the interpreter in tests/ptx executes nvcc's PTX on the CPU, one block after the
other, so that counts are reproducible. Writes benchmarks/results/ptx-sm_90.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fcos_d2.ops import assign_targets, batched_nms, batched_nms_padded, select_candidates
from tests.ops.backends import use
from tests.ptx import ptx

from .batched_nms import THRESHOLD, random_detections
from .box_loss import losses_of
from .select_candidates import RULE, SHIFT
from .workload import CLASSES, LEVELS, RANGES, make_batch

RESULTS = Path(__file__).parent / "results" / "ptx-sm_90.md"
IMAGES = 16
ISSUE_SLOTS = 132 * 4 * 1.98e9  # warp instructions per second of an H200
COLUMNS = (
    "workload", "kernel", "blocks", "threads", "shared bytes", "instructions", "us of issue",
    "longest warp", "its global accesses", "its barriers", "atomics",
)  # fmt: skip
CPU = torch.device("cpu")


def workloads() -> Iterator[tuple[str, Callable]]:
    """Yields the name and a call of each workload."""
    for count in (100, 1000):
        batch = make_batch(IMAGES, count, CPU)
        truth = batch.boxes, batch.classes, batch.offsets
        yield (
            f"assign_targets, {count} boxes",
            lambda a=truth: assign_targets(*a, LEVELS, RANGES, num_classes=CLASSES),
        )
    # float32 has the same kernels, but needs twice the memory in the interpreter.
    yield "all losses, bfloat16", losses_of(make_batch(IMAGES, 100, CPU, torch.bfloat16))
    for images in (IMAGES, 1):
        batch = make_batch(images, 8, CPU, torch.bfloat16)
        maps = [[x.detach() for x in level] for level in (batch.logits, batch.ltrb, batch.quality)]
        for what, shift in (("16.7k candidates", SHIFT), ("few", -2.0), ("all logits pass", 25.0)):
            logits = [x + shift for x in maps[0]]
            yield (
                f"post-processing, {images} x {what}",
                lambda x=(logits, *maps[1:]), s=batch.sizes: batched_nms_padded(
                    *select_candidates(*x, LEVELS, s, **RULE)
                ),
            )
    boxes, scores, classes = random_detections(IMAGES * 1000, CPU)
    padded = boxes.view(IMAGES, -1, 4), scores.view(IMAGES, -1), classes.view(IMAGES, -1)
    yield (
        f"batched_nms_padded, {IMAGES} x 1000 boxes, all kept",
        lambda: batched_nms_padded(*padded, iou_threshold=THRESHOLD, max_detections=1000),
    )
    flat = random_detections(20000, CPU)
    yield "batched_nms, 20000 boxes", lambda: batched_nms(*flat, THRESHOLD)


class _Operations(TorchDispatchMode):
    """Counts the kernels that torch would launch on a GPU in addition to ours."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        returns = function._schema.returns
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
        name = function.name()
        if name.startswith("aten::") and not is_view and "empty" not in name:
            self.names.append(name.removeprefix("aten::"))
        return function(*arguments, **(options or {}))


def _short(kernel: str) -> str:
    """Returns a kernel's name without namespaces, template arguments and parameters."""
    return (re.findall(r"\d([a-z_]+_kernel)", kernel) or [kernel])[-1]


def rows_of(name: str, call: Callable) -> list[tuple]:
    """Returns the counts of all kernels in one call."""
    ptx.take_records()
    with _Operations() as operations:
        call()
    records = ptx.take_records()
    launches = sum(record["launches"] for record in records.values())
    others = ", ".join(sorted(operations.names)) or "none"
    rows = [(name, f"**{launches + len(operations.names)} operations**, of torch: {others}")]
    for kernel, record in records.items():
        every, longest = record["all"], record["longest"]
        rows.append(
            (
                "", _short(kernel), record["blocks"],
                record["threads"], record["shared bytes"], every["instructions"],
                f"{every['instructions'] / ISSUE_SLOTS * 1e6:.1f}", longest["instructions"],
                longest["global accesses"], longest["barriers"], every["atomics"],
            )
        )  # fmt: skip
        print(*rows[-1], sep="\t", flush=True)
    return rows


def main() -> None:
    """Runs all workloads and writes the table."""
    torch.manual_seed(0)
    lines = [
        "# What nvcc's PTX for sm_90 executes, counted on the CPU",
        "",
        f"`python -m benchmarks.ptx`. {IMAGES} images unless stated, 800x1344, 80 classes. "
        "Instructions count once per warp. Their time is that of 132 multiprocessors with 4 issue "
        "slots at 1.98 GHz, if nothing else is a bottleneck. PTX is not SASS: ptxas splits and "
        "fuses some instructions.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    with use(ptx.overloads()):
        for name, call in workloads():
            for row in rows_of(name, call):
                cells = [*map(str, row), *[""] * (len(COLUMNS) - len(row))]
                lines.append(f"| {' | '.join(cells)} |")
    RESULTS.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
