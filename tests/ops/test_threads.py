"""Every op gives in any thread, whatever the others do, the bits that it gives alone."""

import sys
import time
import warnings
from functools import partial

import pytest
import torch

from fcos_d2.ops import _library
from tests.together import run_together

from . import calls, isolated

THREADS, ROUNDS = 4, 4
OPS = {
    "assign_targets": calls.assignment,
    "sigmoid_focal_loss": partial(calls.focal_loss, torch.float32, False),
    "box_loss": partial(calls.box, torch.float32, True),
    "select_candidates": partial(calls.candidates, torch.bfloat16, False),
    "batched_nms": calls.flat_nms,
    "batched_nms_padded": partial(calls.padded_nms, "gaussian"),
}
# The emulation of CUDA is one thread itself.
ON_THE_CPU = pytest.mark.parametrize(
    "implementation",
    [
        "reference",
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(not isolated.BUILT.exists(), reason="nothing is compiled"),
        ),
    ],
    indirect=True,
)


@pytest.fixture(autouse=True, params=[1, 2])
def threads_of_an_op(request):
    """Of the pool that the ops of all callers share."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def assert_same_together(runs) -> None:
    alone = [calls.bits(run()) for run in runs]
    for results, expected in zip(run_together(runs, ROUNDS), alone, strict=True):
        assert all(calls.bits(result) == expected for result in results)


@ON_THE_CPU
@pytest.mark.parametrize("op", OPS)
def test_threads_with_inputs_of_their_own(op):
    assert_same_together([OPS[op]() for _ in range(THREADS)])


@ON_THE_CPU
@pytest.mark.parametrize("op", OPS)
def test_threads_that_share_their_inputs(op):
    assert_same_together([OPS[op]()] * THREADS)


@ON_THE_CPU
def test_threads_with_different_ops():
    assert_same_together([make() for make in OPS.values()])


ONCE = pytest.mark.parametrize(
    "implementation, threads_of_an_op", [("reference", 1)], indirect=True
)


def pause_before_every_line(frame, event, argument):
    """A trace function: all threads come to a line before any of them executes it."""
    if frame.f_code is not _library._announce_reference.__code__:
        return None
    time.sleep(0.005)
    return pause_before_every_line


@ONCE
def test_threads_that_miss_the_library_at_once_warn_once(monkeypatch):
    said = []
    monkeypatch.setattr(_library, "_loaded", set())
    monkeypatch.setattr(_library, "_has_warned", False)
    monkeypatch.setattr(warnings, "warn", lambda *message, **_: said.append(message))
    monkeypatch.delenv("FCOS_D2_STRICT", raising=False)

    def announce():
        sys.settrace(pause_before_every_line)  # of this thread
        try:
            _library._announce_reference("box_loss", "cpu")
        finally:
            sys.settrace(None)

    run_together([announce] * THREADS)
    assert len(said) == 1


FIRST_USE = """
import threading
start, found = threading.Barrier(8), []

def use():
    import torch
    start.wait()
    from fcos_d2 import ops
    levels = ops.make_levels([(2, 2)], [8])
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    targets = ops.assign_targets(
        boxes, torch.tensor([1]), torch.tensor([0, 1]), levels, [(-1, 64)], num_classes=2
    )
    maps = [[torch.zeros(1, channels, 2, 2, requires_grad=True)] for channels in (2, 4, 1)]
    logits, ltrb, quality = maps
    box_losses = ops.box_loss(ltrb, quality, targets)
    loss = ops.sigmoid_focal_loss(logits, targets.labels) + sum(box_losses)
    loss.backward()
    chosen = ops.select_candidates(*maps, levels, torch.tensor([[16, 16]]), topk=4)
    kept = ops.batched_nms(boxes, torch.ones(1), torch.tensor([1]), 0.5)
    found.append(f"{loss.item():.6f} {logits[0].grad.sum():.6f} {chosen.scores.sum():.6f} {kept}")

threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(found)))
"""


@ONCE
@pytest.mark.parametrize("library", [None, isolated.BUILT], ids=["reference", "compiled"])
def test_threads_that_import_and_use_the_ops_for_the_first_time(library, tmp_path):
    if library is not None and not library.exists():
        pytest.skip("nothing is compiled")
    folder = isolated.make_package(tmp_path, library)
    done = isolated.run(folder, "-W", "always::UserWarning", "-c", FIRST_USE)
    assert done.stdout == "8 1\n", done.stderr
    assert done.stderr.count("fcos_d2: ") == (library is None)
