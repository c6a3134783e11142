"""Benchmarks every op against its peers: ``python -m benchmarks [--device cuda] [op ...]``.

Writes benchmarks/results/<machine>.md after each op, unless only some ops are selected.
"""

from __future__ import annotations

import argparse
import importlib
import os
import warnings
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch reads it

import torch  # noqa: E402

from fcos_d2.ops import backend  # noqa: E402

from .measure import (  # noqa: E402
    HEADER,
    copy_bandwidth,
    describe_machine,
    format_row,
    machine_name,
)
from .peers import missing  # noqa: E402

OPS = ("assign_targets", "sigmoid_focal_loss", "box_loss", "select_candidates", "batched_nms")
OPS += ("end_to_end",)
IMAGES = {"cpu": 2, "cuda": 16}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the benchmarks and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", choices=[*OPS, []], default=[])
    parser.add_argument("--device", choices=IMAGES, default="cpu")
    parser.add_argument("--results", type=Path, help="write the table to this folder too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # deprecations in peers
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    used = {kinds[arguments.device.upper()] for kinds in backend().values()}
    title = f"{describe_machine(device)}; kernels: {', '.join(sorted(used))}"
    notes = [f"A copy moves {copy_bandwidth(device) / 1e9:.1f} GB/s.", missing()]
    notes = " ".join(filter(None, notes))
    print(title, notes, HEADER, sep="\n\n")
    command = "`make bench`" if arguments.device == "cpu" else "`make gpu-bench`"
    lines = [f"# {title}", "", f"{command}. {notes}", "", HEADER]
    folders = [] if arguments.ops else [RESULTS, *filter(None, [arguments.results])]
    for name in arguments.ops or OPS:
        module = importlib.import_module(f"benchmarks.{name}")
        lines += map(format_row, module.run(IMAGES[arguments.device], device))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{machine_name(device)}.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
