"""CUDA kernels around the sizes at which they switch strategy: tiles, chunks, list capacities.

Kernels run in the PTX interpreter, and on the GPU if there is one. Targets, candidates and
detections must be bitwise equal to the CPU's, and losses close to those in float64.
"""

import itertools
import math

import pytest
import torch

from fcos_d2.ops import (
    Targets,
    assign_targets,
    batched_nms,
    batched_nms_padded,
    box_loss,
    make_levels,
    select_candidates,
    sigmoid_focal_loss,
)

from . import inputs
from .backends import overloads_of, use
from .conftest import NOTHING_COMPILED, ON_CUDA
from .strategies import LAYOUTS

pytestmark = [
    pytest.mark.parametrize("implementation", ON_CUDA, indirect=True),
    pytest.mark.skipif(NOTHING_COMPILED is not None, reason=str(NOTHING_COMPILED)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def assert_equals_cpu(call):
    """Compares ``call`` with the CPU kernels bitwise; returns its result."""
    with use(overloads_of("fcos_d2")):
        expected = call()
    found = call()
    single = isinstance(found, torch.Tensor)
    for ours, theirs in zip(*([x] if single else x for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    return found


# ---- assign_targets: tiles of 32 x 8 points, chunks of 256 boxes ----


@pytest.mark.parametrize("counts", [[], [0, 0, 3], [256], [600, 1], [257, 512]])
@pytest.mark.parametrize("shapes", [[(12, 16), (6, 8)], [(0, 5), (8, 32), (9, 33)], [(7, 31)] * 8])
def test_assignment_of_any_number_of_boxes_and_points(counts, shapes):
    levels = make_levels(shapes, [8] * len(shapes))
    truth = inputs.ground_truth(counts, 5, 96, 128, integer=True)
    ranges = [(-1, 40), (40, math.inf), (0, math.inf), *[(10, 30)] * 5][: len(shapes)]
    assert_equals_cpu(lambda: assign_targets(*truth, levels, ranges, num_classes=5))


def test_equal_boxes_are_assigned_by_lowest_index():
    truth = torch.tensor([[0.0, 0.0, 40.0, 40.0]]).repeat(700, 1), torch.arange(700) % 5
    levels, offsets = make_levels([(6, 37)], [8]), torch.tensor([0, 300, 700])
    targets = assert_equals_cpu(
        lambda: assign_targets(*truth, offsets, levels, [(-1, 99)], num_classes=5)
    )
    assert set(targets.matched.flatten().tolist()) == {-1, 0, 300}


# ---- losses: 256 threads with 16 rows each, 16-byte vectors or single elements ----


def assert_equals_float64(loss_of, maps):
    """Compares the loss and its gradients with the float64 kernels on the CPU."""
    maps = [x.detach().requires_grad_() for x in maps]
    wide = [x.detach().double().requires_grad_() for x in maps]
    loss = loss_of(maps)
    grads = torch.autograd.grad(loss, maps)
    with use(overloads_of("fcos_d2")):
        expected = loss_of(wide)
        wanted = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(loss.double(), expected, rtol=1.5e-6, atol=1e-30)
    eps = max(torch.finfo(maps[0].dtype).eps, 1e-6)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=eps, atol=eps / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 15, 17, 80])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "unaligned"])
def test_focal_loss_of_maps_of_any_size(dtype, num_classes, layout):
    shapes = [(33, 8), (12, 16), (1, 40), (17, 1), (5, 10)]
    maps = [torch.randn(2, num_classes, *shape).to(dtype) * 3 - 2 for shape in shapes]
    labels = torch.randint(-1, num_classes + 1, (2, sum(h * w for h, w in shapes))).int()
    labels = torch.where(torch.rand(labels.shape) < 0.7, num_classes, labels)
    assert_equals_float64(
        lambda logits: sigmoid_focal_loss([LAYOUTS[layout](x) for x in logits], labels), maps
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positive", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shapes", [[(20, 33)], [(0, 4), (16, 16), (2, 0), (1, 300)]])
def test_box_loss_of_any_number_of_points(dtype, positive, shapes):
    maps = [torch.rand(2, 4, *shape).to(dtype) * 4 + 0.05 for shape in shapes]
    maps += [torch.randn(2, 1, *shape).to(dtype) for shape in shapes]
    points = 2, sum(h * w for h, w in shapes)
    matched = torch.where(torch.rand(points) < positive, 3, -1).int()
    targets = Targets(None, matched, torch.rand(*points, 4) + 0.05, torch.rand(points), None)
    half = len(shapes)
    assert_equals_float64(lambda x: sum(box_loss(x[:half], x[half:], targets)), maps)


# ---- select_candidates: tiles of 8,192 logits, key lists of limited capacity ----

RISING = torch.linspace(-1, 2, 1800)
LOGITS = {
    "rare": lambda *shape: torch.randn(shape) * 2 - 7,
    "normal": lambda *shape: torch.randn(shape) * 2 - 1,
    "ties": lambda *shape: (torch.randn(shape) * 2 - 1).round(),
    "all equal": lambda *shape: torch.full(shape, 0.3),
    "saturated": lambda *shape: torch.randn(shape) + 25,
    "crowded": lambda *shape: 1 + torch.rand(shape) * 1e-4,
    "rising": lambda *shape: RISING[: shape[2] * shape[3]].view(shape[2:]) + torch.rand(shape) / 10,
    "falling": lambda *shape: LOGITS["rising"](*shape).flip(2, 3),
}


def candidates_of(
    kind, shapes, num_classes, images=2, dtype=torch.float32, layout="nchw", **options
):
    maps = [
        [LAYOUTS[layout](make(images, channels, *shape).to(dtype)) for shape in shapes]
        for channels, make in ((num_classes, LOGITS[kind]), (4, torch.rand), (1, torch.randn))
    ]
    levels = make_levels(shapes, [8 * 2**level for level in range(len(shapes))])
    sizes = torch.tensor([[200, 300]] * images)
    return lambda: select_candidates(*maps, levels, sizes, **options)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("topk", [1, 60, 3000])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
def test_candidates_with_and_without_list_overflow(kind, topk, threshold):
    """Each image has five tiles; the first ones may overflow the list."""
    call = candidates_of(kind, [(30, 60), (2, 3)], 20, topk=topk, score_threshold=threshold)
    assert_equals_cpu(call)


def test_fewer_candidates_than_slots_but_more_than_fit_into_shared_memory():
    call = candidates_of("normal", [(30, 60)], 20, topk=3000, score_threshold=0.876)
    counts = (assert_equals_cpu(call).classes >= 0).sum(1)
    assert all(2048 < count < 3000 for count in counts)


def test_list_overflow_with_more_tiles_than_blocks():
    """After an overflow, 264 blocks read 313 tiles of 512 points again."""
    call = candidates_of("normal", [(400, 400)], 1, images=1, topk=60, score_threshold=0.0)
    assert_equals_cpu(call)


@pytest.mark.parametrize("num_classes", [1, 2, 80, 129, 300])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (24, 24)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_of_maps_of_any_size(num_classes, shape, layout, dtype):
    call = candidates_of("rare", [shape], num_classes, dtype=dtype, layout=layout, topk=50)
    assert_equals_cpu(call)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("num_classes, points", [(16, 512), (16, 520), (128, 64), (128, 72)])
def test_candidates_in_tile_corners(num_classes, points, layout):
    """Full and partial tiles."""
    logits = torch.full((1, num_classes, 1, points), -30.0)
    for n, (point, channel) in enumerate(itertools.product((0, -1), repeat=2)):
        logits[0, channel, 0, point] = n + 1.0
    maps = [LAYOUTS[layout](logits)], [torch.ones(1, 4, 1, points)], [torch.ones(1, 1, 1, points)]
    levels, sizes = make_levels([(1, points)], [8]), torch.tensor([[8, 8]])
    found = assert_equals_cpu(lambda: select_candidates(*maps, levels, sizes, topk=10))
    assert found.classes[0].tolist() == [num_classes - 1, 0, num_classes - 1, 0] + [-1] * 6


@pytest.mark.parametrize("equal", [50, 7675, 7680, 7685, 23000])
def test_ties_across_tile_boundaries(equal):
    """Tiles of 7,680 equal logits, except for 100 higher ones at the end of the last tile."""
    shape = 30, 41
    logits = torch.full((1, 20, *shape), 0.3)
    logits[0, :, 29, 36:] = 2.0
    maps = [logits], [torch.rand(1, 4, *shape)], [torch.full((1, 1, *shape), 0.3)]
    levels, sizes = make_levels([shape], [8]), torch.tensor([[8, 8]])
    call = lambda: select_candidates(*maps, levels, sizes, topk=100 + equal)  # noqa: E731
    assert_equals_cpu(call)


# ---- batched_nms: blocks of 64 boxes, sorts of the best few hundred ----


def overlapping(count):
    corner = torch.rand(count, 2) * 40 - 20
    return torch.cat((corner, corner + torch.rand(count, 2) * 30 + 2), dim=1)


def disjoint(count):
    return overlapping(count) + torch.arange(count)[:, None] * 100.0


def crowds(count):
    """Returns small boxes around 40 centers."""
    return overlapping(count) * 0.2 + torch.randint(40, (count, 1)) * torch.tensor([20.0, 0, 20, 0])


def scores_of(kind, *shape):
    return torch.full(shape, 0.5) if kind == "all equal" else torch.rand(shape)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("num_classes", [1, 100])
@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
def test_nms_of_any_number_of_boxes(count, num_classes, method):
    boxes = torch.stack((overlapping(count), crowds(count)))
    classes, scores = torch.randint(-1, num_classes, (2, count)), torch.rand(2, count)
    assert_equals_cpu(lambda: batched_nms_padded(boxes, scores, classes, 0.5, 30, method=method))
    flat = [x.flatten(0, 1) for x in (boxes, scores, classes)]
    assert_equals_cpu(lambda: batched_nms(*flat, 0.5))


@pytest.mark.parametrize("detections", [1, 63, 64, 65, 2000])
@pytest.mark.parametrize("kind", ["different", "all equal"])
def test_more_boxes_than_are_sorted_at_once(detections, kind):
    boxes, classes = disjoint(1800)[None], torch.randint(-1, 3, (1, 1800))
    scores = scores_of(kind, 1, 1800)
    assert_equals_cpu(lambda: batched_nms_padded(boxes, scores, classes, 0.5, detections))


def test_nms_continues_until_all_slots_are_full():
    """The best 1,200 boxes are equal, so only lower-ranked boxes can fill the slots."""
    boxes = disjoint(1500)[None]
    boxes[0, :1200] = boxes[0, 0]
    scores, classes = torch.linspace(1, 0, 1500)[None], torch.zeros(1, 1500).long()
    found = batched_nms_padded(boxes, scores, classes, 0.5, 10)
    assert torch.equal(found.boxes[0], boxes[0, [0, *range(1200, 1209)]])


@pytest.mark.parametrize("distance", [1, 512, 1024, 2**32])
def test_kept_boxes_do_not_suppress_other_classes(distance):
    """Equal boxes, 64 per class, including classes with equal hashes."""
    boxes = overlapping(1).expand(1, 320, 4)
    classes = (torch.arange(320) // 64 * distance)[None]
    scores = torch.linspace(1, 0.5, 320)[None]
    for order in (torch.arange(320), torch.randperm(320)):
        found = batched_nms_padded(boxes, scores, classes[:, order], 0.5)
        assert found.counts.tolist() == [5] and found.classes[0, :5].unique().numel() == 5
    agnostic = batched_nms_padded(boxes, scores, classes, 0.5, class_agnostic=True)
    assert agnostic.counts.tolist() == [1]


@pytest.mark.parametrize("num_classes", [1, 5, 80])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("detections", [100, 1000])
def test_many_kept_boxes(num_classes, class_agnostic, detections):
    boxes, scores = crowds(1000)[None], torch.rand(1, 1000)
    classes = torch.randint(num_classes, (1, 1000))
    options = {"class_agnostic": class_agnostic, "max_detections": detections}
    assert_equals_cpu(lambda: batched_nms_padded(boxes, scores, classes, 0.3, **options))


@pytest.mark.parametrize(
    "sizes",
    [
        [64, 64, 64],  # at block boundaries
        [63, 65, 64, 1],
        [1, 200, 1, 150],  # groups that span blocks
        [100, 20, 20, 20, 100],  # groups inside a block
        [32, 64, 32, 128],  # at the second 32-bit word of a block
        [31, 66, 33, 62, 200],
        [700],
        [1] * 300,
    ],
)
def test_flat_nms_of_any_group_boundaries(sizes):
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    boxes, scores = overlapping(len(groups)), torch.rand(len(groups))
    assert_equals_cpu(lambda: batched_nms(boxes, scores, groups, 0.3))
