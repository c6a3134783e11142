"""Training ops on a GPU: the results of the CPU, no waiting, few launches, CUDA graphs, streams."""

from functools import partial

import pytest
import torch

from benchmarks.measure import captured
from fcos_d2.ops import assign_targets, backend, box_loss, sigmoid_focal_loss

from . import inputs, subprocesses
from .gpu import forbidden_to_wait, results_on_streams

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.parametrize("implementation", ["compiled"], indirect=True),
    pytest.mark.skipif(
        backend()["assign_targets"]["CUDA"] != "compiled",
        reason="fcos_d2/_C_cuda.so is not built",
    ),
]

CLASSES, LEVELS = 80, inputs.pyramid()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def batch(device="cuda", dtype=torch.float32, counts=(20, 0, 3), seed=0):
    """(maps, packed ground truth) of three images, one without objects."""
    torch.manual_seed(seed)
    maps = inputs.predictions(LEVELS, len(counts), CLASSES, dtype)
    truth = inputs.ground_truth(counts, CLASSES)
    return [[x.to(device) for x in level] for level in maps], [x.to(device) for x in truth]


def losses_and_gradients(maps, truth):
    """What a training step computes outside of convolutions, without waiting for anything."""
    maps = [[x.detach().requires_grad_() for x in level] for level in maps]
    ranges = inputs.ranges(len(LEVELS.strides))
    targets = assign_targets(*truth, LEVELS, ranges, num_classes=CLASSES)
    scale = 1 / targets.counts[..., 0].sum().clamp(min=1)
    cls = sigmoid_focal_loss(maps[0], targets.labels, scale=scale, save_gradient=True)
    box, quality = box_loss(maps[1], maps[2], targets)
    flat = [x for level in maps for x in level]
    losses = (cls, box, quality)
    return [*losses, *torch.autograd.grad(cls + (box + quality) * scale, flat)]


def assert_close(found, expected, dtype):
    eps = max(torch.finfo(dtype).eps, 1e-6)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_are_those_of_the_cpu(dtype):
    found = losses_and_gradients(*batch(dtype=dtype))
    assert_close(found, losses_and_gradients(*batch("cpu", dtype)), dtype)


def test_the_same_bits_in_every_run():
    arguments = batch(dtype=torch.bfloat16)
    first = losses_and_gradients(*arguments)
    for _ in range(100):
        for got, want in zip(losses_and_gradients(*arguments), first, strict=True):
            assert torch.equal(got, want)


def test_nothing_waits_for_the_gpu():
    arguments = batch()
    losses_and_gradients(*arguments)
    with forbidden_to_wait():
        losses_and_gradients(*arguments)


def test_cuda_graph_follows_its_inputs():
    maps, truth = batch()
    graph, found = captured(lambda: losses_and_gradients(maps, truth))
    for seed in (1, 2, 3):
        other_maps, other_truth = batch(seed=seed)
        pairs = [*zip(sum(maps, []), sum(other_maps, []), strict=True)]
        for old, new in [*pairs, *zip(truth, other_truth, strict=True)]:
            old.copy_(new)
        graph.replay()
        assert_close(found, losses_and_gradients(other_maps, other_truth), torch.float32)


def test_two_streams_do_not_disturb_each_other():
    calls = [partial(losses_and_gradients, *batch(seed=seed)) for seed in (1, 2)]
    expected = [call() for call in calls]
    for found in results_on_streams(calls, rounds=20):
        for got, want in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_more_elements_than_32_bits_count():
    """Only the last plane, beyond 2^31, has anything to say."""
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
def test_bad_value_ends_the_process_with_its_reason(program, message):
    done = subprocesses.run_python(subprocesses.ROOT, "-W", "ignore", "-c", program)
    assert done.returncode != 0 and message in done.stderr
    assert "device-side assert" in done.stderr
