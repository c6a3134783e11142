"""Ops on the GPU: results, synchronization, launches, memory, CUDA graphs and streams."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from benchmarks.measure import captured
from fcos_d2.ops import (
    assign_targets,
    backend,
    batched_nms,
    batched_nms_padded,
    box_loss,
    make_levels,
    select_candidates,
    sigmoid_focal_loss,
)

from . import inputs, subprocesses

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.parametrize("implementation", ["compiled"], indirect=True),
    pytest.mark.skipif(
        backend()["assign_targets"]["CUDA"] != "compiled",
        reason="fcos_d2/_C_cuda.so is not built",
    ),
]

CLASSES, LEVELS = 80, inputs.pyramid(256, 320, 4)
STANDARD = make_levels([(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)], (8, 16, 32, 64, 128))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def to_gpu(value):
    """Copies tensors, in lists and tuples of any depth, to the GPU."""
    return value.cuda() if isinstance(value, torch.Tensor) else [to_gpu(part) for part in value]


def flat(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for part in value for x in flat(part)]


def assert_close(found, expected, tolerance=0.0):
    for got, want in zip(flat(found), flat(expected), strict=True):
        options = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(got.cpu(), want.cpu(), **options)


# ---- training ----


def training_batch(dtype=torch.float32, seed=0):
    """Returns maps and packed ground truth of three images, one without objects."""
    torch.manual_seed(seed)
    counts = (20, 0, 3)
    maps = inputs.predictions(LEVELS, len(counts), CLASSES, dtype)
    return maps, inputs.ground_truth(counts, CLASSES)


def losses_and_gradients(maps, truth):
    """Computes the targets, losses and gradients of a training step."""
    maps = [[x.detach().requires_grad_() for x in level] for level in maps]
    ranges = inputs.ranges(len(LEVELS.strides))
    targets = assign_targets(*truth, LEVELS, ranges, num_classes=CLASSES)
    scale = 1 / targets.totals[0].clamp(min=1)
    cls = sigmoid_focal_loss(maps[0], targets.labels, scale=scale, save_gradient=True)
    box, quality = box_loss(maps[1], maps[2], targets)
    return [cls, box, quality, *torch.autograd.grad(cls + (box + quality) * scale, flat(maps))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_match_the_cpu(dtype):
    batch = training_batch(dtype)
    tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6)
    assert_close(losses_and_gradients(*to_gpu(batch)), losses_and_gradients(*batch), tolerance)


# ---- inference ----


def head_outputs(levels=LEVELS, images=2, dtype=torch.bfloat16, prior=-3.0, channels_last=False):
    """Returns (logits, ltrb, quality, image sizes)."""
    options = {"prior": prior, "channels_last": channels_last}
    maps = inputs.predictions(levels, images, CLASSES, dtype, **options)
    return *maps, torch.tensor([[250, 300]] * images)


def select(head, levels=LEVELS, **options):
    return select_candidates(*head[:3], levels, head[3], **options)


def detect(*head, levels=LEVELS):
    return batched_nms_padded(*select(head, levels))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("prior", [-9.0, -3.0, 5.0, 25.0])
@pytest.mark.parametrize("topk", [1, 100, 1000, 5000])
def test_candidates_match_the_cpu_bitwise(dtype, channels_last, prior, topk):
    head = head_outputs(dtype=dtype, prior=prior, channels_last=channels_last)
    assert_close(select(to_gpu(head), topk=topk), select(head, topk=topk))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_candidates_that_are_all_equal(threshold):
    head = head_outputs()
    for level in (*head[0], *head[2]):
        level.fill_(0.3)
    options = {"score_threshold": threshold, "clip": True}
    assert_close(select(to_gpu(head), **options), select(head, **options))


def random_boxes(images, count, num_classes):
    boxes = torch.stack([inputs.boxes(count) for _ in range(images)])
    scores = (torch.rand(images, count) * 2000).round() / 2000  # some are equal
    return boxes, scores, torch.randint(-1, num_classes, (images, count))


@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("detections", [1, 100, 3000])
def test_detections_match_the_cpu_bitwise(method, class_agnostic, detections):
    batch = random_boxes(3, 2500, 20)
    options = {"method": method, "class_agnostic": class_agnostic}
    found = batched_nms_padded(*to_gpu(batch), 0.6, detections, **options)
    assert_close(found, batched_nms_padded(*batch, 0.6, detections, **options))


@pytest.mark.parametrize("count, groups", [(0, 1), (1, 1), (1000, 80), (20_000, 80), (200_000, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_nms_matches_the_cpu(count, groups, dtype):
    boxes, scores, classes = (x[0] for x in random_boxes(1, count, groups))
    arguments = boxes.to(dtype), scores.to(dtype), classes.clamp(min=0)
    assert_close(batched_nms(*to_gpu(arguments), 0.5), batched_nms(*arguments, 0.5))


# ---- training and inference ----


def train(seed: int) -> Callable:
    return partial(losses_and_gradients, *to_gpu(training_batch(torch.bfloat16, seed)))


def infer(prior: float) -> Callable:
    return partial(detect, *to_gpu(head_outputs(prior=prior)))


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Makes every synchronization with the host an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CALLS = {
    "training": partial(train, 0),
    "inference": partial(infer, -3.0),
    "inference, all pass": partial(infer, 25.0),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_runs_are_bitwise_equal_and_do_not_synchronize(make):
    call = make()
    expected = call()  # loads the kernels
    for _ in range(100):
        with no_synchronization():
            found = call()
        assert_close(found, expected)


def test_soft_nms_does_not_synchronize():
    batch = to_gpu(random_boxes(3, 100, 20))
    batched_nms_padded(*batch, method="gaussian")  # loads the kernels
    with no_synchronization():
        batched_nms_padded(*batch, method="gaussian")


def test_flat_nms_synchronizes_once():
    boxes, scores, classes = (x[0].cuda() for x in random_boxes(1, 500, 80))
    batched_nms(boxes, scores, classes, 0.5)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warnings:
            batched_nms(boxes, scores, classes, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warnings if "synchroniz" in str(w.message)]) == 1


# The priors result in few, some, all and many candidates.
@pytest.mark.parametrize("make, keys", [(train, (0, 1, 2, 3)), (infer, (-9.0, -3.0, 25.0, 0.0))])
def test_cuda_graph_replays_with_new_inputs(make, keys):
    calls = [make(key) for key in keys]
    graph, found = captured(calls[0])
    for call in calls[1:]:
        for old, new in zip(flat(calls[0].args), flat(call.args), strict=True):
            old.copy_(new)
        graph.replay()
        assert_close(found, call())


CAPTURE = """
from tests.ops import test_on_gpu as gpu

for make in gpu.CALLS.values():
    call = make()
    graph, found = gpu.captured(call)
    graph.replay()
    gpu.assert_close(found, call())
"""


def test_cuda_graph_can_be_captured_in_a_new_process():
    done = subprocesses.run_python(subprocesses.ROOT, "-W", "ignore", "-c", CAPTURE)
    assert done.returncode == 0, done.stderr


BUSY = """
import sys, threading, torch

closed = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), closed.set())).start()
x = torch.rand(2048, 2048, device="cuda")
print("busy", flush=True)
while not closed.is_set():
    torch.softmax(x @ x, 1, out=x)
    torch.cuda.synchronize()
"""


@contextmanager
def busy_gpu() -> Iterator[None]:
    """Keeps the GPU busy from another process."""
    command = [sys.executable, "-W", "ignore", "-c", BUSY]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "busy\n"
        yield
        other.stdin.close()
        assert other.wait() == 0


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_another_process_on_the_gpu_does_not_change_results(make):
    call = make()
    expected = call()
    with busy_gpu():
        for _ in range(100):
            assert_close(call(), expected)


def nms_of_one_class() -> Callable:
    return partial(batched_nms, *(x[0].cuda() for x in random_boxes(1, 5000, 3)), 0.5)


def test_streams_do_not_interfere():
    calls = [train(1), train(2), infer(-3.0), infer(25.0), nms_of_one_class()]
    expected = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
        torch.cuda.synchronize()
        assert_close(found, expected)


def test_post_processing_takes_four_launches():
    call = partial(detect, *to_gpu(head_outputs(STANDARD)), levels=STANDARD)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [
        e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert len(on_device) == 4, on_device


@pytest.mark.parametrize("prior", [-5.0, 25.0])
def test_peak_memory_is_at_most_5_percent_of_the_head_outputs(prior):
    head = to_gpu(head_outputs(STANDARD, images=16, prior=prior))
    detect(*head, levels=STANDARD)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    detect(*head, levels=STANDARD)
    size = sum(level.nbytes for level in flat(head[:3]))
    assert torch.cuda.max_memory_allocated() - before <= 0.05 * size


# ---- more than 2^31 elements ----


def test_focal_loss_of_more_than_two_to_the_31_logits():
    """Only the last plane, beyond 2^31, is nonzero."""
    side, classes = 5200, 80
    logits = torch.full((1, classes, side, side), -1e4, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    logits[:, -1] = 0
    labels = torch.full((1, side * side), classes, dtype=torch.int32, device="cuda")
    labels[:, -1] = classes - 1
    loss = sigmoid_focal_loss([logits.requires_grad_()], labels)
    per_negative, positive = 0.75 * 0.25 * 0.6931472, 0.25 * 0.25 * 0.6931472
    assert loss.item() == pytest.approx(per_negative * (side * side - 1) + positive, rel=1e-5)
    (grad,) = torch.autograd.grad(loss, [logits])
    assert grad[0, -1, -1, -1] < 0 < grad[0, -1, -1, -2]
    assert not grad[0, :-1].any()


def test_candidates_of_more_than_two_to_the_31_logits():
    """1203 classes of 128 images: 3.4e9 logits."""
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB")
    levels = make_levels([(100, 168), (50, 84)], (8, 16))

    def maps(channels, value):
        options = {"dtype": torch.half, "device": "cuda"}
        return [torch.full((128, channels, h, w), value, **options) for h, w in levels.shapes]

    logits = maps(1203, -9.0)
    logits[0][-1, -1, -1, -1] = logits[1][-1, -1, -1, -1] = 3
    sizes = torch.tensor([[800, 1344]] * 128, device="cuda")
    found = select_candidates(logits, maps(4, 1.0), maps(1, 0.0), levels, sizes, topk=10)
    assert (found.classes >= 0).sum() == 2
    assert found.classes[-1, 0] == found.classes[-1, 10] == 1202


# ---- invalid values ----

ASSIGN = """
import torch
from fcos_d2.ops import assign_targets, make_levels
truth = torch.zeros(2, 4), torch.tensor({classes}), torch.tensor({offsets})
levels = make_levels([(4, 4)], [8])
assign_targets(*(x.cuda() for x in truth), levels, [(-1, 64)], num_classes=3)
torch.cuda.synchronize()
"""
FOCAL_LOSS = """
import torch
from fcos_d2.ops import sigmoid_focal_loss
labels = torch.full((1, 16), {label}, dtype=torch.int32)
sigmoid_focal_loss([torch.zeros(1, 3, 4, 4).cuda()], labels.cuda())
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    "program, message",
    [
        (ASSIGN.format(classes=[0, 3], offsets=[0, 2]), "assign_targets: gt_classes must lie in"),
        (ASSIGN.format(classes=[-2, 0], offsets=[0, 2]), "assign_targets: gt_classes must lie in"),
        (ASSIGN.format(classes=[0, 0], offsets=[0, 1]), "assign_targets: gt_offsets must rise"),
        (FOCAL_LOSS.format(label=4), "sigmoid_focal_loss: labels must lie in"),
        (FOCAL_LOSS.format(label=-2), "sigmoid_focal_loss: labels must lie in"),
    ],
)
def test_invalid_value_fails_a_device_assertion(program, message):
    done = subprocesses.run_python(subprocesses.ROOT, "-W", "ignore", "-c", program)
    assert done.returncode != 0 and message in done.stderr
    assert "device-side assert" in done.stderr
