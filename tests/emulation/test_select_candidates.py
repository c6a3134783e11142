"""csrc/cuda/select_candidates.cu selects what the rule in float64 says, and has the CPU's bits."""

import itertools
import math

import pytest
import torch

from fcos_d2.ops import backend, make_levels, point_coordinates, reference
from fcos_d2.ops.select_candidates import SCORE_RULES
from tests.ops import oracles
from tests.ops.strategies import LAYOUTS

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HAS_CPU_KERNEL = backend()["select_candidates"]["CPU"] == "compiled"
DEFAULTS = {
    "score_threshold": 0.05,
    "topk": 1000,
    "threshold_with_quality": False,
    "rank_with_quality": True,
    "score_rule": "sqrt",
    "clip": False,
}


def of_normal(*shape):
    return torch.randn(shape) * 2 - 1


def with_infinities(*shape):
    kind = torch.randint(12, shape)
    x = of_normal(*shape)
    for i, special in enumerate((math.nan, math.inf, -math.inf, 90.0, -90.0)):
        x = torch.where(kind == i, special, x)
    return x


def rising(*shape):
    """From the first point of an image to the last."""
    return torch.linspace(-1, 2, shape[2] * shape[3]).view(shape[2:]) + torch.rand(shape) * 0.1


# Logits of several temperaments.
SPREADS = {
    "normal": of_normal,
    "rare": lambda *shape: of_normal(*shape) - 6,
    "ties": lambda *shape: of_normal(*shape).round(),
    "all equal": lambda *shape: torch.full(shape, 0.3),
    "saturated": lambda *shape: of_normal(*shape) + 25,
    "none": lambda *shape: torch.full(shape, -30.0),
    "infinities": with_infinities,
    "crowded": lambda *shape: 1 + torch.rand(shape) * 1e-4,
    "rising": rising,
    "falling": lambda *shape: rising(*shape).flip(2, 3),
}


def random_maps(shapes, images, num_classes, spread="normal", dtype=torch.float32, layout="nchw"):
    """(logits, ltrb, quality); left and top are 0, so that a box tells its point."""
    lay_out, make = LAYOUTS[layout], SPREADS[spread]
    logits = [lay_out(make(images, num_classes, h, w).to(dtype)) for h, w in shapes]
    quality = [lay_out(make(images, 1, h, w).to(dtype)) for h, w in shapes]
    ltrb = [torch.rand(images, 4, h, w) * 4 for h, w in shapes]
    for level in ltrb:
        level[:, :2] = 0
    return logits, [lay_out(level.to(dtype)) for level in ltrb], quality


def levels_of(shapes, offset=0.5):
    return make_levels(shapes, [8 * 2**level for level in range(len(shapes))], offset=offset)


def arguments_of(maps, levels, **options):
    """The arguments of the op; clipping at (50, 40) if it is on."""
    pitches = [p for pair in levels.pitches for p in pair]
    sizes = torch.tensor([[50, 40]]).repeat(len(maps[0][0]), 1)
    geometry = list(levels.strides), pitches, levels.offset
    return (*maps, sizes, *geometry, *(DEFAULTS | options).values())


def assert_has_the_bits_of_the_cpu(found, arguments):
    if HAS_CPU_KERNEL:
        expected = torch.ops.fcos_d2.select_candidates(*arguments)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_level_has_the_best(found, logits, ltrb, quality, points, stride, options):
    """Checks one level of one image; ``found`` are boxes, scores and classes of its slots."""
    boxes, scores, classes = found
    count = int((classes >= 0).sum())
    assert (classes[:count] >= 0).all(), "empty slots come last"
    assert (boxes[count:] == 0).all() and (scores[count:] == 0).all()
    point = (boxes[:count, None, :2] == points).all(dim=2).int().argmax(dim=1)
    index = (point * len(logits) + classes[:count]).numpy()
    oracles.check_selection(index, scores[:count], logits, quality, len(classes), options)
    side = ltrb.flatten(1).t()[point].float() * stride
    expected = torch.cat((points[point] - side[:, :2], points[point] + side[:, 2:]), dim=1)
    assert torch.equal(boxes[:count], expected)


def assert_selects_the_best(maps, levels, **options):
    """Compares with the rule in float64 and with the CPU; returns what was selected."""
    arguments = arguments_of(maps, levels, **options)
    found = emulated.ops().select_candidates(*arguments)
    assert_has_the_bits_of_the_cpu(found, arguments)
    options = DEFAULTS | options
    logits, ltrb, quality = maps
    images, num_classes = logits[0].shape[:2]
    slots = [min(options["topk"], num_classes * n) for n in levels.points_per_level]
    points = point_coordinates(levels).split(levels.points_per_level)
    parts = zip(*(x.split(slots, dim=1) for x in found), strict=True)
    for level, part in enumerate(parts):
        for b in range(images):
            assert_level_has_the_best(
                [x[b] for x in part], *(side[level][b] for side in (logits, ltrb, quality)),
                points[level], levels.strides[level], options,
            )  # fmt: skip
    return found


@pytest.mark.parametrize("score_rule", SCORE_RULES)
@pytest.mark.parametrize("threshold_with_quality", [False, True])
@pytest.mark.parametrize("rank_with_quality", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules_and_dtypes(score_rule, threshold_with_quality, rank_with_quality, dtype):
    shapes = [(6, 8), (3, 4), (1, 1)]
    assert_selects_the_best(
        random_maps(shapes, 2, 5, dtype=dtype), levels_of(shapes), topk=20, score_rule=score_rule,
        threshold_with_quality=threshold_with_quality, rank_with_quality=rank_with_quality,
    )  # fmt: skip


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("topk", [1, 3, 60, 1000])
def test_lists_that_overflow_or_do_not(spread, topk):
    shapes = [(12, 10), (4, 4)]
    assert_selects_the_best(random_maps(shapes, 2, 7, spread), levels_of(shapes), topk=topk)


@pytest.mark.parametrize("spread", ["normal", "all equal", "crowded", "saturated"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_every_or_no_logit_passes(spread, threshold):
    shapes = [(30, 40)]  # several tiles of a level
    found = assert_selects_the_best(
        random_maps(shapes, 1, 20, spread), levels_of(shapes), score_threshold=threshold, topk=900
    )
    assert (found[2] >= 0).sum() == (900 if threshold == 0 else 0)


@pytest.mark.parametrize("spread", ["normal", "rare", "crowded", "rising", "falling"])
@pytest.mark.parametrize("topk", [60, 3000])
def test_what_a_tile_counts_spares_later_tiles_only_losers(spread, topk):
    """Five tiles of each image, of which the first ones overflow the list or do not."""
    shapes = [(30, 60), (2, 3)]
    maps, levels = random_maps(shapes, 2, 20, spread), levels_of(shapes)
    expected = assert_selects_the_best(maps, levels, topk=topk)
    arguments = arguments_of(maps, levels, topk=topk)
    for number in range(1, 4):
        with emulated.schedule(number):
            found = emulated.ops().select_candidates(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("num_classes, points", [(16, 512), (16, 520), (128, 64), (128, 72)])
def test_corners_of_tiles(num_classes, points, layout):
    """Tiles with as many points, or classes, as there can be, and what is left over."""
    (logits, ltrb, quality) = random_maps([(1, points)], 1, num_classes, "none", layout=layout)
    quality[0].fill_(1.0)
    for n, (point, channel) in enumerate(itertools.product((0, -1), repeat=2)):
        logits[0][0, channel, 0, point] = n + 1.0
    found = assert_selects_the_best((logits, ltrb, quality), levels_of([(1, points)]), topk=10)
    last = num_classes - 1
    assert found[2][0].tolist() == [last, 0, last, 0] + [-1] * 6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [1, 16])
def test_layouts(layout, dtype, num_classes):
    shapes = [(4, 8), (3, 5)]
    maps = random_maps(shapes, 3, num_classes, dtype=dtype, layout=layout)
    assert_selects_the_best(maps, levels_of(shapes), topk=25)


@pytest.mark.parametrize("num_classes", [1, 2, 80, 129, 300])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (24, 24)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_sizes(num_classes, shape, layout):
    maps = random_maps([shape], 1, num_classes, "rare", torch.bfloat16, layout)
    assert_selects_the_best(maps, levels_of([shape]), topk=50)


def test_more_candidates_than_shared_memory_sorts():
    shapes = [(24, 24)]
    maps = random_maps(shapes, 1, 10)
    assert_selects_the_best(maps, levels_of(shapes), topk=2500, score_threshold=0.0)


def test_equal_candidates_end_where_a_tile_ends():
    """Tiles of 7,680 equal logits, and 100 better ones at the end of the last tile."""
    shapes = [(30, 41)]
    logits, ltrb, quality = random_maps(shapes, 1, 20, "all equal")
    logits[0][0, :, 29, 36:].fill_(2.0)
    for equal in (50, 7675, 7680, 7685):
        assert_selects_the_best((logits, ltrb, quality), levels_of(shapes), topk=100 + equal)


def test_maps_of_different_dtypes():
    shapes = [(5, 6)]
    (logits, ltrb, _) = random_maps(shapes, 1, 3, dtype=torch.bfloat16)
    quality = random_maps(shapes, 1, 3, dtype=torch.float64)[2]
    ltrb = [level.half() for level in ltrb]
    assert_selects_the_best((logits, ltrb, quality), levels_of(shapes), topk=10)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("clip", [False, True])
def test_boxes_equal_the_reference(offset, clip):
    shapes = [(6, 7), (3, 4)]
    levels = make_levels(shapes, [7, 13], offset=offset)  # products that are not exact
    logits, ltrb, quality = random_maps(shapes, 2, 3)
    ltrb = [torch.rand_like(level) * 9 - 1 for level in ltrb]
    arguments = arguments_of((logits, ltrb, quality), levels, clip=clip, topk=30)
    found = emulated.ops().select_candidates(*arguments)
    expected = reference.select_candidates(*arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
    assert_has_the_bits_of_the_cpu(found, arguments)


@pytest.mark.parametrize("images, shapes", [(0, [(2, 3)]), (2, [(0, 3), (2, 2)])])
def test_empty_inputs(images, shapes):
    maps = random_maps(shapes, images, 4)
    arguments = arguments_of(maps, levels_of(shapes), topk=3)
    found = emulated.ops().select_candidates(*arguments)
    for ours, theirs in zip(found, reference.select_candidates(*arguments), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert_has_the_bits_of_the_cpu(found, arguments)


@pytest.mark.parametrize("spread", ["ties", "all equal", "crowded"])
def test_order_of_blocks_and_threads_changes_no_bit(spread):
    shapes = [(20, 30), (3, 3)]
    arguments = arguments_of(random_maps(shapes, 2, 4, spread), levels_of(shapes), topk=60)
    expected = emulated.ops().select_candidates(*arguments)
    for number in range(1, 5):
        with emulated.schedule(number):
            found = emulated.ops().select_candidates(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
