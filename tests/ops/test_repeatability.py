"""Every op gives the same bits every time, on any number of threads."""

import pytest
import torch

from fcos_d2.ops import (
    assign_targets,
    batched_nms,
    batched_nms_padded,
    box_loss,
    select_candidates,
    sigmoid_focal_loss,
)

from . import inputs, isolated

# The reference is as repeatable as torch is.
pytestmark = [
    pytest.mark.parametrize("implementation", ["compiled"], indirect=True),
    pytest.mark.skipif(not isolated.BUILT.exists(), reason="nothing is compiled"),
]
RUNS = 100
LEVELS = inputs.pyramid(256, 320)  # 1,705 points: enough pieces of work for three threads
IMAGES, CLASSES = 3, 20


def flat(results) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for part in results for x in flat(part)]


def assignment():
    packed = inputs.ground_truth([40, 0, 25], CLASSES)
    return lambda: assign_targets(*packed, LEVELS, inputs.ranges(5), num_classes=CLASSES)


def focal_loss(dtype, channels_last):
    logits, _, _ = inputs.predictions(LEVELS, IMAGES, CLASSES, dtype, channels_last=channels_last)
    maps = [x.requires_grad_() for x in logits]
    labels = inputs.targets(LEVELS, [9, 0, 30], CLASSES).labels

    def run():
        loss = sigmoid_focal_loss(maps, labels)
        return loss, torch.autograd.grad(loss, maps)

    return run


def box(dtype, channels_last):
    _, ltrb, quality = inputs.predictions(
        LEVELS, IMAGES, CLASSES, dtype, channels_last=channels_last
    )
    maps = [x.requires_grad_() for x in (*ltrb, *quality)]
    targets = inputs.targets(LEVELS, [9, 0, 30], CLASSES)

    def run():
        losses = box_loss(ltrb, quality, targets)
        return losses, torch.autograd.grad(sum(losses), maps)

    return run


def candidates(dtype, channels_last):
    maps = inputs.predictions(
        LEVELS, IMAGES, CLASSES, dtype, prior=0.0, channels_last=channels_last
    )
    maps[0][0].copy_(maps[0][0].float().round())  # ties
    sizes = torch.tensor([[256, 320]] * IMAGES)
    return lambda: select_candidates(*maps, LEVELS, sizes, topk=200)


def crowd(count=300):
    scores = torch.randint(0, 50, (IMAGES, count)) / 50  # ties
    labels = torch.randint(-1, 3, (IMAGES, count))
    return inputs.boxes(IMAGES * count).view(IMAGES, count, 4), scores, labels


def flat_nms():
    boxes, scores, labels = (x.flatten(0, 1) for x in crowd(100))
    return lambda: batched_nms(boxes, scores, labels, 0.5)


def padded_nms(method):
    images = crowd(60)
    return lambda: batched_nms_padded(*images, 0.5, 30, method=method)


@pytest.fixture
def threads():
    """Sets the number of threads, and the old one again at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_repeatable(run, threads) -> None:
    threads(1)
    first = flat(run())
    for number in range(RUNS):
        threads(1 + number % 3)
        for again, before in zip(flat(run()), first, strict=True):
            bits = (x.contiguous().view(-1).view(torch.uint8) for x in (again, before))
            assert torch.equal(*bits)


@pytest.mark.parametrize("make", [assignment, flat_nms])
def test_targets_and_kept_boxes(make, threads):
    assert_repeatable(make(), threads)


@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
def test_padded_detections(method, threads):
    assert_repeatable(padded_nms(method), threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", [focal_loss, box, candidates])
def test_losses_gradients_and_candidates(make, dtype, channels_last, threads):
    assert_repeatable(make(dtype, channels_last), threads)
