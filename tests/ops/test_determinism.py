"""Ops return bitwise equal results in every run, with any number of threads, and concurrently."""

import threading
import warnings
from functools import partial

import pytest
import torch

from fcos_d2.ops import (
    _library,
    assign_targets,
    batched_nms,
    batched_nms_padded,
    box_loss,
    select_candidates,
    sigmoid_focal_loss,
)
from fcos_d2.ops.fcos_loss import fcos_loss
from tests.concurrency import run_concurrently

from . import drive_kernels, inputs, subprocesses

LEVELS = inputs.pyramid(256, 320)  # 1,705 points: enough work for three threads
IMAGES, CLASSES, RUNS, THREADS, ROUNDS = 3, 20, 100, 4, 4
COMPILED = pytest.param(
    "compiled",
    marks=pytest.mark.skipif(not subprocesses.BUILT.exists(), reason="nothing is compiled"),
)


@pytest.fixture(autouse=True)
def restored_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(results) -> list[tuple[torch.dtype, torch.Size, bytes]]:
    """Returns all tensors in ``results`` as bytes."""
    if not isinstance(results, torch.Tensor):
        return [x for part in results for x in bits(part)]
    raw = results.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [(results.dtype, results.shape, raw)]


# ---- Each function returns a call of an op on fixed random inputs. ----


def assignment():
    packed = inputs.ground_truth([40, 0, 25], CLASSES)
    return lambda: assign_targets(*packed, LEVELS, inputs.ranges(5), num_classes=CLASSES)


def maps(dtype, channels_last, prior=-3.0):
    options = {"prior": prior, "channels_last": channels_last}
    return inputs.predictions(LEVELS, IMAGES, CLASSES, dtype, **options)


def with_gradients(losses, leaves):
    leaves = [x.requires_grad_() for x in leaves]

    def run():
        values = losses()
        return values, torch.autograd.grad(sum(values), leaves)

    return run


def focal_loss(dtype=torch.float32, channels_last=False):
    logits, _, _ = maps(dtype, channels_last)
    labels = inputs.targets(LEVELS, [9, 0, 30], CLASSES).labels
    return with_gradients(lambda: [sigmoid_focal_loss(logits, labels)], logits)


def boxes_loss(dtype=torch.float32, channels_last=True):
    _, ltrb, quality = maps(dtype, channels_last)
    targets = inputs.targets(LEVELS, [9, 0, 30], CLASSES)
    return with_gradients(lambda: box_loss(ltrb, quality, targets), [*ltrb, *quality])


def all_losses(dtype=torch.float32, channels_last=False):
    predictions = maps(dtype, channels_last)
    targets = inputs.targets(LEVELS, [9, 0, 30], CLASSES)
    normalizers = [(total, 1.0) for total in targets.totals[[0, 1, 0]]]
    options = dict(save_gradient=True, **drive_kernels.OPTIONS)
    leaves = [x for level in predictions for x in level]
    return with_gradients(lambda: fcos_loss(*predictions, targets, normalizers, **options), leaves)


def candidates(dtype=torch.bfloat16, channels_last=False):
    logits, ltrb, quality = maps(dtype, channels_last, prior=0.0)
    logits[0].copy_(logits[0].float().round())  # ties
    sizes = torch.tensor([[256, 320]] * IMAGES)
    return lambda: select_candidates(logits, ltrb, quality, LEVELS, sizes, topk=200)


def detections(count):
    scores = torch.randint(0, 50, (IMAGES, count)) / 50  # ties
    labels = torch.randint(-1, 3, (IMAGES, count))
    return inputs.boxes(IMAGES * count).view(IMAGES, count, 4), scores, labels


def flat_nms():
    boxes, scores, labels = (x.flatten(0, 1) for x in detections(100))
    return lambda: batched_nms(boxes, scores, labels, 0.5)


def padded_nms(method="gaussian"):
    images = detections(60)
    return lambda: batched_nms_padded(*images, 0.5, 30, method=method)


OPS = [assignment, focal_loss, boxes_loss, all_losses, candidates, flat_nms, padded_nms]
VARIANTS = [
    *OPS,
    partial(padded_nms, "hard"),
    partial(padded_nms, "linear"),
    *(
        partial(op, dtype, channels_last)
        for op in (focal_loss, boxes_loss, all_losses, candidates)
        for dtype in (torch.float32, torch.bfloat16)
        for channels_last in (False, True)
    ),
]


# The reference is as deterministic as torch.
@pytest.mark.parametrize("implementation", [COMPILED], indirect=True)
@pytest.mark.parametrize("make", VARIANTS)
def test_results_are_bitwise_equal_on_any_number_of_threads(make):
    run = make()
    torch.set_num_threads(1)
    first = bits(run())
    for number in range(RUNS):
        torch.set_num_threads(1 + number % 3)
        assert bits(run()) == first


# The PTX interpreter is single-threaded.
@pytest.mark.parametrize("implementation", ["reference", COMPILED], indirect=True)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["own inputs", "shared inputs"])
@pytest.mark.parametrize("ops", [*([op] * THREADS for op in OPS), OPS], ids=[*OPS, "all"])
def test_concurrent_calls_do_not_affect_each_other(ops, shared, threads):
    torch.set_num_threads(threads)  # of the pool that all callers share
    calls = {op: op() for op in ops}
    runs = [calls[op] if shared else op() for op in ops]
    alone = [bits(run()) for run in runs]
    for results, expected in zip(run_concurrently(runs, ROUNDS), alone, strict=True):
        assert all(bits(result) == expected for result in results)


ONCE = pytest.mark.parametrize("implementation", ["reference"], indirect=True)


class OvertakenLock:
    """A lock that another thread acquires and releases before the first owner gets it."""

    def __init__(self, other):
        self.lock, self.others = threading.Lock(), [other]

    def __enter__(self):
        if self.others:
            self.others.pop()()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


@ONCE
def test_only_one_of_two_racing_threads_warns(monkeypatch):
    messages = []
    report = partial(_library._report_reference, "box_loss", "cpu")
    lock = OvertakenLock(report)
    monkeypatch.setattr(_library, "_loaded", set())
    monkeypatch.setattr(_library, "_has_warned", False)
    monkeypatch.setattr(_library, "_warning_lock", lock)
    monkeypatch.setattr(warnings, "warn", lambda *message, **_: messages.append(message))
    monkeypatch.delenv("FCOS_D2_STRICT", raising=False)
    report()
    assert len(messages) == 1 and not lock.others


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
    loss = ops.sigmoid_focal_loss(logits, targets.labels)
    (loss + sum(ops.box_loss(ltrb, quality, targets))).backward()
    chosen = ops.select_candidates(*maps, levels, torch.tensor([[16, 16]]), topk=4)
    kept = ops.batched_nms(boxes, torch.ones(1), torch.tensor([1]), 0.5)
    found.append(f"{loss.item():.6f} {logits[0].grad.sum():.6f} {chosen.scores.sum():.6f} {kept}")

threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(found)))
"""


@ONCE
@pytest.mark.parametrize("library", [None, subprocesses.BUILT], ids=["reference", "compiled"])
def test_threads_can_import_and_first_use_the_ops_concurrently(library, tmp_path):
    if library is not None and not library.exists():
        pytest.skip("nothing is compiled")
    folder = subprocesses.make_package(tmp_path, library)
    done = subprocesses.run_python(folder, "-W", "always::UserWarning", "-c", FIRST_USE)
    assert done.stdout == "8 1\n", done.stderr
    assert done.stderr.count("fcos_d2: ") == (library is None)
