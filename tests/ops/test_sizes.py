"""Sizes around 2^31: what the kernels count in 64 bits, and what they refuse because it is 32.

A part of a file that nobody touches costs nothing, so maps here lie in gigabytes of address space:
a few small planes, each 2^30 elements and more away from the next. A wrong offset reads zeros, or
ends the process.
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

from ..emulation import emulated

NEEDS_COMPILER = pytest.mark.skipif(bool(emulated.missing()), reason=str(emulated.missing()))
EMULATED = pytest.param("emulated", marks=NEEDS_COMPILER)
# A GPU has memory for large maps: tests/ops/test_*_on_gpu.py.
ON_THE_CPU = pytest.mark.parametrize(
    "implementation", ["reference", "compiled", EMULATED], indirect=True
)
COMPILED = pytest.mark.parametrize("implementation", ["compiled"], indirect=True)
H, W, K, B = 4, 8, 3, 2
FAR = 2**31 + 64  # elements between two images; a multiple of 16, so that maps stay aligned
POINTS = H * W
HUGE = 2**16  # whose square is more than 32 bits hold


def far_apart(values: torch.Tensor, channel: int = 2**30) -> torch.Tensor:
    """The same values, but images lie FAR and channels ``channel`` elements from each other."""
    images, channels, _, width = values.shape
    size = (images * FAR + channels * channel) * values.element_size()
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=values.dtype)
    out = memory.as_strided(values.shape, (FAR, channel, width, 1))
    return out.copy_(values)


def maps(channels: int, dtype=torch.float16) -> torch.Tensor:
    return torch.randn(B, channels, H, W).to(dtype)


def targets() -> Targets:
    matched = torch.randint(-1, 2, (B, POINTS), dtype=torch.int32)
    return Targets(None, matched, torch.rand(B, POINTS, 4) + 0.1, torch.rand(B, POINTS), None)


def gradients(losses, given):
    return torch.autograd.grad(sum(losses), given)


# ---- Elements further apart than 32 bits can say ----


@ON_THE_CPU
def test_focal_loss_of_maps_that_are_far_apart(implementation):
    near, labels = maps(K), torch.randint(-1, K + 1, (B, POINTS), dtype=torch.int32)
    # A thread of the GPU steps through 16 channels in 32 bits; what is further apart is refused.
    far = far_apart(near, channel=2**16 if implementation == "emulated" else 2**30)
    for save in (False, True):
        near, far = near.detach().requires_grad_(), far.detach().requires_grad_()
        losses = [sigmoid_focal_loss([x], labels, save_gradient=save) for x in (near, far)]
        torch.testing.assert_close(losses[1], losses[0])
        (want,), (got,) = gradients(losses[:1], [near]), gradients(losses[1:], [far])
        torch.testing.assert_close(got, want)


@ON_THE_CPU
def test_box_loss_of_maps_that_are_far_apart():
    sides, quality, wanted = maps(4).abs() + 0.1, maps(1), targets()
    near = [sides.requires_grad_(), quality.requires_grad_()]
    far = [far_apart(x.detach()).requires_grad_() for x in near]
    losses = [box_loss([a], [b], wanted) for a, b in (near, far)]
    torch.testing.assert_close(losses[1], losses[0])
    for want, got in zip(gradients(losses[0], near), gradients(losses[1], far), strict=True):
        torch.testing.assert_close(got, want)


@ON_THE_CPU
def test_candidates_of_maps_that_are_far_apart():
    near = [maps(K), maps(4).abs(), maps(1)]
    far = [far_apart(x) for x in near]
    levels, sizes = make_levels([(H, W)], [8]), torch.tensor([[32, 64]] * B)
    want, got = (
        select_candidates(*([x] for x in given), levels, sizes, topk=20) for given in (near, far)
    )
    assert (want.classes >= 0).sum() > 10
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ---- What is too large says so ----


@pytest.mark.parametrize("implementation", [EMULATED], indirect=True)
@pytest.mark.parametrize("case", ["far apart", "many"])
def test_the_gpu_refuses_maps_that_it_cannot_step_or_launch(case):
    logits = far_apart(maps(K)) if case == "far apart" else torch.zeros(()).expand(B, 2**30, H, W)
    labels = torch.zeros(B, POINTS, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="sigmoid_focal_loss: .* too large for one launch"):
        sigmoid_focal_loss([logits], labels)


def huge(channels: int) -> torch.Tensor:
    return torch.zeros(()).expand(1, channels, HUGE, HUGE)


def test_levels_of_more_points_than_32_bits_count_are_refused():
    none = torch.zeros(0, 4), torch.zeros(0).long(), torch.tensor([0, 0])
    expected = "at most 2147483647 points"
    with pytest.raises(ValueError, match=f"assign_targets: levels.shapes .*{expected}"):
        assign_targets(*none, Levels(((HUGE, HUGE),), (8,), ((8, 8),)), [(-1, 64)], num_classes=1)
    labels = torch.zeros((), dtype=torch.int32).expand(1, HUGE**2)
    with pytest.raises(ValueError, match=rf"sigmoid_focal_loss: logits\[l\] .*{expected}"):
        sigmoid_focal_loss([huge(1)], labels)
    with pytest.raises(ValueError, match=rf"box_loss: ltrb\[l\] .*{expected}"):
        box_loss([huge(4)], [huge(1)], targets())
    with pytest.raises(ValueError, match=rf"select_candidates: logits\[l\] .*{expected}"):
        levels = Levels(((HUGE, HUGE),), (8,), ((8, 8),))
        select_candidates([huge(1)], [huge(4)], [huge(1)], levels, torch.ones(1, 2).long())


def test_more_pairs_of_point_and_class_than_32_bits_number_are_refused():
    one = torch.zeros(())
    logits, sides, quality = (one.expand(1, n, 256, 256) for n in (HUGE, 4, 1))
    levels = make_levels([(256, 256)], [8])
    with pytest.raises(ValueError, match=r"select_candidates: logits\[l\] .* less than 2\^32"):
        select_candidates([logits], [sides], [quality], levels, torch.ones(1, 2).long())


def test_more_boxes_than_32_bits_number_are_refused():
    boxes = torch.zeros(4).expand(2**31, 4)
    classes = torch.zeros((), dtype=torch.int64).expand(2**31)
    with pytest.raises(ValueError, match="assign_targets: gt_boxes must be at most"):
        assign_targets(
            boxes, classes, torch.tensor([0, 2**31]), make_levels([(1, 1)], [8]), [(-1, 64)],
            num_classes=1,
        )  # fmt: skip


# ---- One of that size ----

FREE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@COMPILED
@pytest.mark.slow
@pytest.mark.skipif(FREE < 12 * 2**30, reason="needs 12 GiB of free memory")
@pytest.mark.parametrize("size", [2**25 + 2, 2**25 + 3])
@pytest.mark.parametrize("is_row", [True, False])
def test_levels_longer_than_float32_counts(size, is_row):
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
@pytest.mark.skipif(FREE < 12 * 2**30, reason="needs 12 GiB of free memory")
def test_focal_loss_of_a_map_of_more_than_two_to_the_31_elements():
    """Only the last plane, beyond 2^31, has anything to say."""
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
