"""Random cases of every op for property tests.

A case consists of a few numbers and names, so that failures are readable and shrink quickly. Its
seed and these determine its tensors.
"""

import math
from itertools import pairwise
from typing import Annotated, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fcos_d2.ops import Levels, Targets, make_levels, reference

# Number of cases: a sample is the same in every run, a campaign is always new.
SAMPLE, CAMPAIGN = 120, 20_000
MANY = pytest.mark.parametrize(
    "cases", [SAMPLE, pytest.param(CAMPAIGN, marks=pytest.mark.slow)], ids=["sample", "campaign"]
)
# Logits that break naive formulas, by saturation, overflow of exp, or softplus in half precision.
EXTREME_LOGITS = [0.0, 17.0, -17.0, 88.0, -88.0, 1e4, -1e4]
BROKEN = [math.nan, math.inf, -math.inf]
SHAPES = [(0, 3), (1, 1), (1, 5), (3, 4), (4, 4), (2, 17), (7, 9)]


def unaligned(x: Tensor) -> Tensor:
    """Copies a tensor to an address one element past the alignment of vectors."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


# Memory layouts of a map [B, C, H, W]. Only the expanded ones change its values.
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "channel_slice": lambda x: torch.cat((x, x[:, :1]), dim=1)[:, :-1],
    "channels_last_slice": lambda x: LAYOUTS["channels_last"](torch.cat((x, x), 1)).chunk(2, 1)[0],
    "row_slice": lambda x: torch.cat((x, x[..., :1]), dim=3)[..., :-1],
    "every_second": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "unaligned": unaligned,
    "expanded_batch": lambda x: x[:1].expand_as(x),
}
# torch creates such maps, for example in forward-mode differentiation.
EXPANDED_LAYOUTS = {
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_rows": lambda x: x[:, :, :1].expand_as(x),
    "expanded_columns": lambda x: x[..., :1].expand_as(x),
    "expanded_points": lambda x: x[:, :, :1, :1].expand_as(x),
    "expanded_everywhere": lambda x: x[:1, :1, :1, :1].expand_as(x),
}
ALL_LAYOUTS = LAYOUTS | EXPANDED_LAYOUTS


def for_all(strategy, cases: int, holds) -> None:
    """Calls ``holds`` with random cases; shrinks and prints a failure."""
    settings(
        max_examples=cases,
        deadline=None,
        derandomize=cases <= SAMPLE,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )(given(strategy)(holds))()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pick(values, shape, g: torch.Generator) -> Tensor:
    """Returns random elements of ``values``."""
    values = torch.as_tensor(values)
    return values[torch.randint(len(values), tuple(shape), generator=g)]


def lay_out(maps: list[Tensor], names: list[str]) -> list[Tensor]:
    """Applies a layout to each map."""
    return [ALL_LAYOUTS[name](x) for x, name in zip(maps, names, strict=False)]


def one_of(*values):
    """Field type: one of ``values``."""
    return Annotated[object, st.sampled_from(values)]


def options(**strategies):
    """Field type: keyword arguments."""
    return Annotated[dict, st.fixed_dictionaries(strategies)]


def integer(low: int, high: int):
    return Annotated[int, st.integers(low, high)]


def three(field):
    """Field type: a list of three values of ``field``."""
    return Annotated[list, st.lists(st.from_type(field), min_size=3, max_size=3)]


PIXEL_EXTENTS = st.sampled_from([0, 1])
Seed = integer(0, 2**31)
DType = one_of(torch.float32, torch.float16, torch.bfloat16, torch.float64)
ThreeLayouts = three(one_of(*ALL_LAYOUTS))
Shapes = Annotated[list, st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)]


# ---- assign_targets ----

NUM_CLASSES = 5


def grid_boxes(m: int, g: torch.Generator, unit: float = 2.0) -> Tensor:
    """Returns boxes on a grid, where sides, range bounds and areas often coincide exactly."""
    corner = torch.randint(-4, 40, (m, 2), generator=g) * unit
    return torch.cat((corner, corner + torch.randint(0, 30, (m, 2), generator=g) * unit), 1)


def float_boxes(m: int, g: torch.Generator) -> Tensor:
    corner = torch.rand(m, 2, generator=g) * 100 - 10
    return torch.cat((corner, corner + torch.rand(m, 2, generator=g) ** 2 * 120), 1)


def broken_boxes(m: int, g: torch.Generator) -> Tensor:
    """Returns boxes, half of them inverted, empty, huge, infinite or NaN."""
    boxes = grid_boxes(m, g)
    values = [*BROKEN, 0.0, 1e30, -1e30, 3e38, -3e38, 1e-38]
    broken = torch.where(torch.rand(m, 4, generator=g) < 0.5, pick(values, (m, 4), g), boxes)
    return torch.where(torch.rand(m, 1, generator=g) < 0.5, broken, boxes)


BOX_KINDS = {
    "grid": grid_boxes,
    "half_grid": lambda m, g: grid_boxes(m, g, 0.5),
    "float": float_boxes,
    "equal": lambda m, g: grid_boxes(min(m, 1), g).expand(m, 4),
    "broken": broken_boxes,
}


@st.composite
def levels(draw) -> Levels:
    shapes = draw(st.lists(st.sampled_from([*SHAPES, (12, 10)]), min_size=1, max_size=3))
    strides = draw(st.sampled_from([[4, 8, 16], [8, 16, 32], [8, 8, 8]]))[: len(shapes)]
    image_shape = draw(st.sampled_from([None, None, (90, 70)]))
    offset = draw(st.sampled_from([0.0, 0.5, 0.3]))
    return make_levels(shapes, strides, offset=offset, image_shape=image_shape)


FEW, MORE_THAN_A_CHUNK = (
    st.integers(0, 9),
    st.integers(60, 200),
)  # the reference processes 64 boxes at a time


class AssignCase(NamedTuple):
    seed: Seed
    counts: Annotated[list, st.lists(st.one_of(*[FEW] * 19, MORE_THAN_A_CHUNK), max_size=3)]
    boxes: one_of(*BOX_KINDS)
    levels: Annotated[Levels, levels()]
    bounds: one_of((-1, 16, 32, math.inf), (0, 8, 8, 64), (4, 12.3, 40, 80))
    transposed: bool
    options: options(
        center_radius=st.sampled_from([0.0, 0.3, 1.0, 1.5, 2.5, math.inf]),
        inclusive=st.booleans(),
        pixel_extent=PIXEL_EXTENTS,
    )

    @property
    def ranges(self) -> list[tuple[float, float]]:
        return list(pairwise(self.bounds))[: len(self.levels.strides)]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (boxes, classes, offsets); classes are in [-1, NUM_CLASSES)."""
        g, m = generator(self.seed), sum(self.counts)
        boxes = BOX_KINDS[self.boxes](m, g)
        classes = torch.randint(-1, NUM_CLASSES, (m,), generator=g)
        if self.transposed:
            boxes, classes = boxes.t().contiguous().t(), torch.stack((classes, classes), 1)[:, 0]
        return boxes, classes, torch.tensor([0, *self.counts]).cumsum(0)


# ---- sigmoid_focal_loss ----


def mixed_with(values, share=0.1):
    """Returns a generator of normal logits, some replaced by ``values``."""

    def make(shape, g):
        ordinary = torch.randn(shape, generator=g) * 3 - 2
        return torch.where(torch.rand(shape, generator=g) < share, pick(values, shape, g), ordinary)

    return make


LOGIT_KINDS = {
    "normal": lambda shape, g: torch.randn(shape, generator=g) * 3 - 2,
    "wide": lambda shape, g: torch.randn(shape, generator=g) * 30,
    "extreme": lambda shape, g: pick(EXTREME_LOGITS, shape, g),
    "mixed": mixed_with(EXTREME_LOGITS),
    "one_extreme": lambda shape, g: pick(EXTREME_LOGITS, (), g).expand(shape),
    "broken": mixed_with(BROKEN),
}


class FocalCase(NamedTuple):
    seed: Seed
    shapes: Shapes
    images: integer(0, 3)
    num_classes: one_of(1, 2, 3, 15, 16, 17, 40)
    logits: one_of(*LOGIT_KINDS)
    dtype: DType
    layouts: ThreeLayouts
    alpha: one_of(0.25, 0.25, -1.0, 0.0, 0.5, 1.0)
    gamma: one_of(2.0, 2.0, 0.0, 0.5, 1.0, 1.5, 3.0)
    upstream: one_of(1.0, -1.7, 1 / 512)

    def tensors(self) -> tuple[list[Tensor], Tensor]:
        """Returns (logits, labels)."""
        g, make = generator(self.seed), LOGIT_KINDS[self.logits]
        maps = [make((self.images, self.num_classes, h, w), g) for h, w in self.shapes]
        points = sum(h * w for h, w in self.shapes)
        labels = torch.randint(-1, self.num_classes + 1, (self.images, points), generator=g)
        return lay_out([x.to(self.dtype) for x in maps], self.layouts), labels.int()


# ---- box_loss ----

LTRB_KINDS = {
    "near": lambda shape, g: torch.rand(shape, generator=g) * 4 + 0.05,
    "relu": lambda shape, g: (torch.randn(shape, generator=g) * 2 + 1).relu(),
    "zero": lambda shape, g: torch.zeros(shape),
    "negative": lambda shape, g: torch.randn(shape, generator=g) * 2,
    "large": lambda shape, g: torch.rand(shape, generator=g) * 1e4,
    "small": lambda shape, g: torch.rand(shape, generator=g) * 1e-3,
}


class BoxCase(NamedTuple):
    seed: Seed
    shapes: Shapes
    images: integer(0, 3)
    ltrb: one_of("near", *LTRB_KINDS)
    positive: one_of(0.0, 0.2, 1.0)
    dtype: DType
    layouts: ThreeLayouts
    options: options(
        loss_type=st.sampled_from(["iou", "linear_iou", "giou", "diou", "ciou"]),
        quality_type=st.sampled_from(["centerness", "iou"]),
        weight_by_centerness=st.booleans(),
    )
    smoothing: three(one_of(0.0, 1.0, 0.125))
    upstream: one_of((1.0, 1.0), (1.7, -0.6), (1 / 512, 1 / 64))

    def tensors(self) -> tuple[list[Tensor], list[Tensor], Targets]:
        """Returns (ltrb, quality, targets); background targets, which no op may read, are NaN."""
        g, make = generator(self.seed), LTRB_KINDS[self.ltrb]
        ltrb = [make((self.images, 4, h, w), g) for h, w in self.shapes]
        quality = [mixed_with(EXTREME_LOGITS)((self.images, 1, h, w), g) for h, w in self.shapes]
        points = (self.images, sum(h * w for h, w in self.shapes))
        positive = torch.rand(points, generator=g) < self.positive
        sides = torch.rand(*points, 4, generator=g) * 4 + 0.05
        sides = torch.where(positive[..., None], sides, math.nan)
        matched = torch.where(positive, 3, -1).int()
        targets = Targets(None, matched, sides, reference.centerness(sides), None)
        ltrb, quality = ([x.to(self.dtype) for x in maps] for maps in (ltrb, quality))
        return lay_out(ltrb, self.layouts), lay_out(quality, self.layouts[::-1]), targets


# ---- select_candidates ----

SCORE_KINDS = {
    "normal": LOGIT_KINDS["normal"],
    # Integers, for ties without scores that rounding could swap.
    "ties": lambda shape, g: torch.randint(-6, 7, shape, generator=g).float(),
    "equal": lambda shape, g: torch.full(shape, 1.0),
    "all_above": lambda shape, g: torch.rand(shape, generator=g) * 4 + 4,
    "none_above": lambda shape, g: torch.rand(shape, generator=g) - 20,
    "mixed": LOGIT_KINDS["mixed"],
    "extreme": LOGIT_KINDS["extreme"],
    "broken": LOGIT_KINDS["broken"],
}
DISTANCE_KINDS = LTRB_KINDS | {"broken": mixed_with([*BROKEN, 3e38, -3e38])}


class SelectCase(NamedTuple):
    seed: Seed
    levels: Annotated[Levels, levels()]
    images: integer(0, 2)
    num_classes: one_of(1, 2, 5, 16, 17, 130)
    logits: one_of("normal", *SCORE_KINDS)
    ltrb: one_of(*DISTANCE_KINDS)
    dtypes: three(DType)
    layouts: ThreeLayouts
    options: options(
        score_threshold=st.sampled_from([0.05, 0.0, 0.3, 0.5, 0.9, 1.0]),
        topk=st.sampled_from([1, 3, 10, 40, 100, 1000]),
        threshold_with_quality=st.booleans(),
        rank_with_quality=st.booleans(),
        score_rule=st.sampled_from(["sqrt", "product", "cls"]),
        clip=st.booleans(),
        pixel_extent=PIXEL_EXTENTS,
        drop_empty=st.booleans(),
    )

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Returns (logits, ltrb, quality, image_sizes)."""
        g, shapes = generator(self.seed), self.levels.shapes
        make, make_ltrb = SCORE_KINDS[self.logits], DISTANCE_KINDS[self.ltrb]
        logits = [make((self.images, self.num_classes, h, w), g) for h, w in shapes]
        quality = [make((self.images, 1, h, w), g) for h, w in shapes]
        ltrb = [make_ltrb((self.images, 4, h, w), g) for h, w in shapes]
        maps = (
            lay_out([x.to(dtype) for x in level], self.layouts)
            for level, dtype in zip((logits, ltrb, quality), self.dtypes, strict=True)
        )
        return *maps, torch.randint(1, 120, (self.images, 2), generator=g)


# ---- batched_nms ----


def clustered_boxes(n: int, g: torch.Generator) -> Tensor:
    """Returns many boxes around a few centers."""
    center = (torch.rand(4, 2, generator=g) * 200 - 100)[torch.randint(4, (n,), generator=g)]
    center = center + torch.randn(n, 2, generator=g) * 3
    half = 10 + torch.rand(n, 2, generator=g) * 10
    return torch.cat((center - half, center + half), 1)


def small_grid_boxes(n: int, g: torch.Generator) -> Tensor:
    """Returns boxes of small integers, whose IoU is often exactly the threshold."""
    corner = torch.randint(-2, 3, (n, 2), generator=g)
    return torch.cat((corner, corner + torch.randint(0, 5, (n, 2), generator=g)), 1).float()


NMS_BOX_KINDS = {
    "clustered": clustered_boxes,
    "float": float_boxes,
    "small_grid": small_grid_boxes,
    "equal": lambda n, g: float_boxes(min(n, 1), g).expand(n, 4),
    "broken": broken_boxes,
}
NMS_SCORE_KINDS = {
    "distinct": lambda n, g: torch.randperm(n, generator=g) / 128 - 0.25,  # exact in half precision
    "ties": lambda n, g: torch.randint(0, 6, (n,), generator=g) / 4,
    "equal": lambda n, g: torch.full((n,), 0.5),
    "broken": lambda n, g: pick([*BROKEN, 0.0, -0.0, 0.5, 1.0], (n,), g),
}


class NmsCase(NamedTuple):
    seed: Seed
    count: Annotated[int, st.integers(0, 3) | st.integers(0, 50) | st.integers(90, 120)]
    boxes: one_of(*NMS_BOX_KINDS)
    scores: one_of(*NMS_SCORE_KINDS)
    num_classes: one_of(1, 3, 80)
    threshold: one_of(0.0, 0.25, 0.3, 0.5, 0.6, 0.75, 1.0)
    box_dtype: DType
    score_dtype: DType
    layout: one_of("contiguous", "transposed", "unaligned")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (boxes, scores, classes) of one image; some classes are negative."""
        g = generator(self.seed)
        boxes = NMS_BOX_KINDS[self.boxes](self.count, g).to(self.box_dtype)
        scores = NMS_SCORE_KINDS[self.scores](self.count, g).to(self.score_dtype)
        classes = torch.randint(-1, self.num_classes, (self.count,), generator=g)
        if self.layout == "transposed":
            boxes, scores = boxes.t().contiguous().t(), torch.stack((scores, scores), 1)[:, 0]
        if self.layout == "unaligned":
            boxes, scores = unaligned(boxes), unaligned(scores)
        return boxes, scores, classes


FEW_BOXES = [st.integers(0, 3), st.integers(0, 40)]


class PaddedCase(NamedTuple):
    seed: Seed
    images: integer(0, 3)
    count: Annotated[int, st.one_of(*FEW_BOXES * 9, st.integers(150, 400))]
    boxes: one_of(*NMS_BOX_KINDS)
    scores: one_of(*NMS_SCORE_KINDS)
    num_classes: one_of(1, 3, 80)
    aligned: bool
    options: options(
        iou_threshold=st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.6, 1.0]),
        max_detections=st.sampled_from([1, 5, 100]),
        class_agnostic=st.booleans(),
        method=st.sampled_from(["hard", "hard", "linear", "gaussian"]),
        sigma=st.sampled_from([0.5, 0.1]),
        min_score=st.sampled_from([0.0, 0.001, 0.3]),
        pixel_extent=PIXEL_EXTENTS,
    )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (boxes, scores, classes) of a batch; some slots are empty."""
        g, shape = generator(self.seed), (self.images, self.count)
        boxes = NMS_BOX_KINDS[self.boxes](self.images * self.count, g).reshape(*shape, 4)
        if self.scores == "distinct" and self.options["method"] != "hard":
            scores = torch.rand(shape, generator=g)
        else:
            scores = NMS_SCORE_KINDS[self.scores](self.images * self.count, g).reshape(shape)
        if not self.aligned:
            boxes, scores = unaligned(boxes), unaligned(scores)
        return boxes, scores, torch.randint(-1, self.num_classes, shape, generator=g)


assign_cases, focal_cases, box_cases, select_cases, nms_cases, padded_cases = map(
    st.builds, (AssignCase, FocalCase, BoxCase, SelectCase, NmsCase, PaddedCase)
)
