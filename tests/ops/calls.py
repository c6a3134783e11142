"""Every op as a call on random inputs that stay the same, and its result as bits.

Each function draws inputs and returns a function without arguments that runs the op on them, and
backward where it has one.
"""

from __future__ import annotations

import torch

from fcos_d2.ops import (
    assign_targets,
    batched_nms,
    batched_nms_padded,
    box_loss,
    select_candidates,
    sigmoid_focal_loss,
)

from . import inputs

LEVELS = inputs.pyramid(256, 320)  # 1,705 points: enough pieces of work for three threads
IMAGES, CLASSES = 3, 20


def bits(results) -> list[tuple[torch.dtype, torch.Size, bytes]]:
    """All tensors in ``results``, to be compared as they lie in memory."""
    if not isinstance(results, torch.Tensor):
        return [x for part in results for x in bits(part)]
    raw = results.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [(results.dtype, results.shape, raw)]


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
