"""Mutation tests of the interpreter: weakens the PTX of the kernels in one place at a time.

Each barrier, fence or mask is removed, and each atomic access becomes a plain one: about 500
mutants, which vary with nvcc. For each, the interpreter must report a fault, or results must differ
in a few calls of the op under a few schedules. Counts of select_candidates that only save work may
miss others, but must be atomic too: plain accesses are data races.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.ops import inputs

from . import ptx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing())),
]

SEEDS = range(1, 7)
WEAKER = {
    "barrier": (r"\tbar(\.warp)?\.sync\s+[^;]+;", "\t"),
    "fence": (r"\t(membar\.gl|fence\.\w+\.gpu);", "\t"),
    "mask": (r"(\t(?:shfl|vote|redux)\.sync\.[^;]+, )(-1|%r\d+);", r"\g<1>2147483647;"),
    "atomic": (r"\t(atom|red)\.", r"\t\g<1>.weak."),
    "relaxed": (r"\t(ld|st)\.relaxed\.gpu\.", r"\t\g<1>."),
    "order": (r"\.(acq_rel|acquire|release)\.", ".relaxed."),
}
LEVELS = inputs.pyramid(128, 160)
CLASSES = 7


def flat(pairs) -> list:
    return list(itertools.chain.from_iterable(pairs))


def calls_of_assignment() -> Iterator[tuple]:
    packed = inputs.ground_truth([300, 0, 9], CLASSES, 128, 160)
    ranges = [float(bound) for bound in flat(inputs.ranges(5))]
    geometry = flat(LEVELS.shapes), list(LEVELS.strides), flat(LEVELS.pitches), LEVELS.offset
    yield "assign_targets", (*packed, *geometry, ranges, CLASSES, 1.5, True)


def calls_of_losses() -> Iterator[tuple]:
    logits, ltrb, quality = inputs.predictions(LEVELS, 3, CLASSES)
    targets = inputs.targets(LEVELS, [30, 0, 9], CLASSES, height=128, width=160)
    yield "sigmoid_focal_loss", (logits, targets.labels, 0.25, 2.0)
    box = ltrb, quality, targets.matched, targets.ltrb, targets.centerness
    rule = "giou", "centerness", True, [0.0] * 5
    yield "box_loss", (*box, *rule)
    maps, packed = (logits, ltrb, quality), [targets.labels, *targets[1:4]]
    divisors, ones = list(targets.totals[[0, 1, 0]].unbind()), [1.0] * 3
    yield "fcos_loss", (*maps, packed, divisors, ones, ones, 0.25, 2.0, *rule, True)


def calls_of_candidates() -> Iterator[tuple]:
    sizes = torch.tensor([[128, 160]] * 3)
    geometry = list(LEVELS.strides), flat(LEVELS.pitches), LEVELS.offset
    for prior, topk in ((-4.0, 50), (0.0, 50), (0.0, 1000)):
        maps = inputs.predictions(LEVELS, 3, CLASSES, prior=prior)
        maps[0][0].copy_(maps[0][0].round())  # ties
        yield "select_candidates", (*maps, sizes, *geometry, 0.05, topk, False, True, "sqrt", True)
    # 20,000 candidates are more than a list holds, 5,120 more than are sorted. Each tile has better
    # ones than those before it, so that none is skipped. All logits above 7 fall into one bin. Rows
    # of 63 are not read as vectors.
    for side, topk, low in ((64, 50, -4), (64, 4000, 8), (63, 4000, -4), (63, 50, 8), (32, 50, 8)):
        level = inputs.pyramid(8 * side, 8 * side, 1)
        geometry = list(level.strides), flat(level.pitches), level.offset
        logits, *others = inputs.predictions(level, 2, 5, prior=0.0)
        rising = logits[0] / 8 + torch.linspace(low, low + 10, side)[:, None]
        sizes = torch.tensor([[8 * side, 8 * side]] * 2)
        rule = 0, topk, False, False, "sqrt", True
        yield "select_candidates", ([rising], *others, sizes, *geometry, *rule)


def calls_of_nms() -> Iterator[tuple]:
    for count, detections, method in (
        (700, 100, "hard"), (5200, 700, "hard"), (700, 20, "gaussian")
    ):  # fmt: skip
        boxes = inputs.boxes(3 * count).view(3, count, 4)
        scores, classes = torch.rand(3, count), torch.randint(-1, 4, (3, count))
        scores[0].clamp_(max=0.01)  # ties
        limits = 0.5, detections, False, method, 0.5, 0.001
        yield "batched_nms_padded", (boxes, scores, classes, *limits)
    yield "batched_nms", (*(x.flatten(0, 1)[:700] for x in (boxes, scores, classes)), 0.5)


OPS = {
    "assign_targets": calls_of_assignment,
    "losses": calls_of_losses,
    "select_candidates": calls_of_candidates,
    "batched_nms": calls_of_nms,
}


def results_of(name: str, arguments: tuple) -> list[torch.Tensor]:
    results = ptx.overloads()[name](*arguments)
    return tree_leaves(results)


def is_noticed(calls: list[tuple], expected: list[list[torch.Tensor]]) -> bool:
    for seed in SEEDS:
        with ptx.schedule(seed):
            for call, wanted in zip(calls, expected, strict=True):
                try:
                    found = results_of(*call)
                except (RuntimeError, AssertionError):
                    return True
                if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                    return True
    return False


def bodies(kernels: set[str]) -> Iterator[tuple[Path, list[str], str, range]]:
    """(file, its lines, kernel, the lines of its body) of kernels."""
    for source in ptx.KERNELS:
        lines = ptx.ptx_of(source).read_text().splitlines()
        for first, line in enumerate(lines):
            name = re.search(r"\.entry (\w+)\(", line)
            if name and name[1] in kernels:
                last = next(i for i in range(first, len(lines)) if lines[i] == "}")
                yield ptx.ptx_of(source), lines, name[1], range(first, last)


def location(lines: list[str], at: int) -> str:
    """The line of csrc/cuda that an instruction belongs to, from the directive before it."""
    loc = next(lines[i] for i in range(at, 0, -1) if "\t.loc\t" in lines[i])
    number, line = re.findall(r"(?:\.loc\t|inlined_at )(\d+) (\d+)", loc)[-1]
    file = next(line for line in lines if line.startswith(f"\t.file\t{number} "))
    return f"{Path(file.split(chr(34))[1]).name}:{line}"


@pytest.mark.parametrize("op", OPS)
def test_whatever_a_kernel_needs_is_missed(op, tmp_path, capsys):
    calls = list(OPS[op]())
    ptx.overloads()
    ptx.take_records()
    expected = [results_of(*call) for call in calls]
    assert not is_noticed(calls, expected)
    executed = {kernel: set(record["lines"]) for kernel, record in ptx.take_records().items()}
    noticed, unnoticed = 0, []
    for path, lines, kernel, body in bodies(set(executed)):
        for at, (kind, (pattern, weaker)) in itertools.product(body, WEAKER.items()):
            changed = re.sub(pattern, weaker, lines[at])
            if changed == lines[at] or at + 1 not in executed[kernel]:
                continue
            mutant = tmp_path / path.name
            mutant.write_text("\n".join([*lines[:at], changed, *lines[at + 1 :]]))
            ptx.load(ptx.library(), mutant)
            if is_noticed(calls, expected):
                noticed += 1
            else:
                unnoticed.append(f"{kind} at {location(lines, at)} ({path.name}:{at + 1})")
        ptx.load(ptx.library(), path)
    with capsys.disabled():
        print(f"\n{op}: {noticed} of {noticed + len(unnoticed)} noticed")
    assert not unnoticed, "\n".join(unnoticed)
