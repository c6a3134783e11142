"""Sizes around 2^31: 64-bit offsets in the kernels, and sizes that must be rejected.

The maps are views of sparse files: a few small planes, 2^30 or more elements apart, which take
little memory. A wrong offset reads zeros or crashes.
"""

import math
import mmap
import os
import tempfile

import pytest
import torch

from fcos_d2.ops import (
    Levels,
    Targets,
    assign_targets,
    box_loss,
    make_levels,
    reference,
    select_candidates,
    sigmoid_focal_loss,
)

from ..ptx import ptx

PTX = pytest.param("ptx", marks=pytest.mark.skipif(bool(ptx.missing()), reason=str(ptx.missing())))
# test_on_gpu.py uses dense maps.
ON_THE_CPU = pytest.mark.parametrize(
    "implementation", ["reference", "compiled", PTX], indirect=True
)
H, W, K, B = 4, 8, 3, 2
FAR = 2**31 + 64  # elements between two images; a multiple of 16, so that maps stay aligned
POINTS = H * W
HUGE = 2**16  # its square exceeds 32 bits


def far_apart(values: torch.Tensor, channel: int = 2**30) -> torch.Tensor:
    """Copies ``values``, with images FAR and channels ``channel`` elements apart."""
    images, channels, _, width = values.shape
    size = (images * FAR + channels * channel) * values.element_size()
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=values.dtype)
    out = memory.as_strided(values.shape, (FAR, channel, width, 1))
    return out.copy_(values)


def maps(channels: int) -> torch.Tensor:
    return torch.randn(B, channels, H, W, dtype=torch.float16)


# ---- elements at offsets beyond 32 bits ----


def assert_same_losses_and_gradients(losses_of, near, far):
    near, far = ([x.detach().requires_grad_() for x in side] for side in (near, far))
    losses = [losses_of(*side) for side in (near, far)]
    torch.testing.assert_close(losses[1], losses[0])
    wanted, found = (
        torch.autograd.grad(sum(*x), side) for *x, side in zip(losses, (near, far), strict=True)
    )
    torch.testing.assert_close(found, wanted)


@ON_THE_CPU
@pytest.mark.parametrize("save_gradient", [False, True])
def test_focal_loss_of_maps_far_apart(implementation, save_gradient):
    logits, labels = maps(K), torch.randint(-1, K + 1, (B, POINTS), dtype=torch.int32)
    # A GPU thread steps through 16 channels with 32-bit offsets; larger strides are rejected.
    far = far_apart(logits, channel=2**16 if implementation == "ptx" else 2**30)
    assert_same_losses_and_gradients(
        lambda x: [sigmoid_focal_loss([x], labels, save_gradient=save_gradient)], [logits], [far]
    )


@ON_THE_CPU
def test_box_loss_of_maps_far_apart():
    near = [maps(4).abs() + 0.1, maps(1)]
    matched = torch.randint(-1, 2, (B, POINTS), dtype=torch.int32)
    targets = Targets(None, matched, torch.rand(B, POINTS, 4) + 0.1, torch.rand(B, POINTS), None)
    assert_same_losses_and_gradients(
        lambda sides, quality: box_loss([sides], [quality], targets), near, map(far_apart, near)
    )


@ON_THE_CPU
def test_candidates_of_maps_far_apart():
    near = [maps(K), maps(4).abs(), maps(1)]
    levels, sizes = make_levels([(H, W)], [8]), torch.tensor([[32, 64]] * B)
    want, got = (
        select_candidates(*([x] for x in given), levels, sizes, topk=20)
        for given in (near, map(far_apart, near))
    )
    assert (want.classes >= 0).sum() > 10
    assert all(map(torch.equal, got, want))


# ---- sizes that are rejected ----


@pytest.mark.parametrize("implementation", [PTX], indirect=True)
@pytest.mark.parametrize("case", ["far apart", "many"])
def test_gpu_rejects_maps_with_too_large_strides_or_grids(case):
    logits = far_apart(maps(K)) if case == "far apart" else torch.zeros(()).expand(B, 2**30, H, W)
    labels = torch.zeros(B, POINTS, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="sigmoid_focal_loss: .* too large for one launch"):
        sigmoid_focal_loss([logits], labels)


def huge(channels: int, side: int = HUGE) -> list[torch.Tensor]:
    return [torch.zeros(()).expand(1, channels, side, side)]


BOX = torch.zeros(1, 4), torch.zeros(1).long(), torch.tensor([0, 1])
MANY_BOXES = torch.zeros(4).expand(2**31, 4), torch.zeros(1).long().expand(2**31), BOX[2] * 2**31
HUGE_LEVEL = Levels(((HUGE, HUGE),), (8,), ((8, 8),))
SMALL_LEVELS = make_levels([(256, 256)], [8])
LABELS, SIZES, RANGES = torch.zeros(1, 1).int(), torch.ones(1, 2).long(), [(-1, 64)]
TOO_MANY_POINTS = "must be .*at most 2147483647 points|must have at most 2147483647 points"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: assign_targets(*BOX, HUGE_LEVEL, RANGES, num_classes=1), TOO_MANY_POINTS),
        (lambda: sigmoid_focal_loss(huge(1), LABELS), TOO_MANY_POINTS),
        (lambda: box_loss(huge(4), huge(1), None), TOO_MANY_POINTS),
        (
            lambda: select_candidates(huge(1), huge(4), huge(1), HUGE_LEVEL, SIZES),
            TOO_MANY_POINTS,
        ),
        (
            lambda: select_candidates(
                huge(HUGE, 256), huge(4, 256), huge(1, 256), SMALL_LEVELS, SIZES
            ),
            r"select_candidates: logits\[l\] .* fewer than 2\^32",
        ),
        (
            lambda: assign_targets(*MANY_BOXES, SMALL_LEVELS, RANGES, num_classes=1),
            "assign_targets: gt_boxes must have at most",
        ),
    ],
)
def test_sizes_beyond_32_bits_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- large dense maps ----

FREE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
COMPILED = pytest.mark.parametrize("implementation", ["compiled"], indirect=True)
LARGE = pytest.mark.skipif(FREE < 12 * 2**30, reason="needs 12 GiB of free memory")


@COMPILED
@pytest.mark.slow
@LARGE
@pytest.mark.parametrize("size", [2**25 + 2, 2**25 + 3])
@pytest.mark.parametrize("is_row", [True, False])
def test_levels_longer_than_the_integers_of_float32(size, is_row):
    levels = make_levels([(1, size) if is_row else (size, 1)], [8])
    end = 8.0 * size
    boxes = torch.tensor([[end - 400, -8, end, 16], [8e7, -8, 8e7 + 400, 16]])
    truth = boxes if is_row else boxes[:, [1, 0, 3, 2]].contiguous(), torch.tensor([1, 2])
    arguments = *truth, torch.tensor([0, 2])
    got = assign_targets(*arguments, levels, [(-1, math.inf)], num_classes=3, center_radius=0)
    shape = [*levels.shapes[0]]
    want = reference.assign_targets(
        *arguments, shape, [8], [8, 8], 0.5, [-1.0, math.inf], 3, 0.0, False
    )
    assert got.counts[0, 0, 0] > 90
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@COMPILED
@pytest.mark.slow
@LARGE
def test_focal_loss_of_a_map_of_more_than_two_to_the_31_elements():
    """Only the last plane, beyond 2^31, is nonzero."""
    side, classes = 5200, 80
    logits = torch.full((1, classes, side, side), -1e4, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    logits[:, -1] = 0
    labels = torch.full((1, side * side), classes, dtype=torch.int32)
    labels[:, -1] = classes - 1
    loss = sigmoid_focal_loss([logits.requires_grad_()], labels)
    per_negative, positive = 0.75 * 0.25 * 0.6931472, 0.25 * 0.25 * 0.6931472
    want = per_negative * (side * side - 1) + positive
    assert loss.item() == pytest.approx(want, rel=1e-5)
    (grad,) = torch.autograd.grad(loss, [logits])
    assert grad[0, -1, -1, -1] < 0 < grad[0, -1, -1, -2]
    assert not grad[0, :-1, ::64].any()
