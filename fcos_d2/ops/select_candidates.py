"""select_candidates: decodes the best (point, class) pairs of every image into boxes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check,
    check_choice,
    check_count,
    check_flags,
    check_levels,
    check_maps,
    check_number,
    check_pixel_extent,
    check_same_device,
    check_tensor,
)
from ._library import define_op
from .levels import Levels

SCORE_RULES = ("sqrt", "product", "cls")


class Candidates(NamedTuple):
    """Boxes that passed the score threshold, in fixed shapes.

    Slots are ordered by level and, within a level, by descending ranking score. An empty slot has
    class -1, score 0 and an all-zero box.

    Attributes:
        boxes: float32 Tensor[B, N, 4], xyxy in pixels of the network input.
        scores: float32 Tensor[B, N] in [0, 1].
        classes: int64 Tensor[B, N] in [0, K), -1 for an empty slot.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def select_candidates(
    logits: Sequence[Tensor],
    ltrb: Sequence[Tensor],
    quality: Sequence[Tensor],
    levels: Levels,
    image_sizes: Tensor,
    *,
    score_threshold: float = 0.05,
    topk: int = 1000,
    threshold_with_quality: bool = False,
    rank_with_quality: bool = True,
    score_rule: str = "sqrt",
    clip: bool = False,
    pixel_extent: int = 0,
    drop_empty: bool = False,
) -> Candidates:
    """Thresholds, ranks and decodes the predictions of a batch, without host synchronization.

    A (point, class) pair is a candidate if its class probability, or the product of class
    probability and quality, exceeds the threshold. The ``topk`` best candidates of each level and
    image are kept; ties go to the lower (point, class). NaN scores never pass, and candidates with
    a non-finite box are dropped. The slots of dropped candidates stay empty.

    Args:
        logits: one Tensor[B, K, H, W] per level, class logits; float32, float16, bfloat16, float64.
        ltrb: one Tensor[B, 4, H, W] per level, distances in strides, decoded in float32.
        quality: one Tensor[B, 1, H, W] per level, quality logits.
        levels: geometry of the points of these levels.
        image_sizes: int64 Tensor[B, 2], (height, width) of each image without padding, in pixels.
        score_threshold: in [0, 1], compared strictly.
        topk: candidates kept per level and image, >= 1.
        threshold_with_quality: compare the product instead of the class probability.
        rank_with_quality: rank by the product instead of the class probability.
        score_rule: final score: "sqrt" of the product (the authors, detectron2, torchvision),
            "product" (mmdetection) or "cls" (quality unused).
        clip: clip the boxes to their image.
        pixel_extent: 1 clips to the last pixels, width - 1 and height - 1 (the original FCOS).
        drop_empty: drop boxes without area after clipping (mmdetection).

    Returns:
        Candidates with N = sum over levels of min(topk, H W K). Not differentiable.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or value.

    Example:
        >>> levels = make_levels([(1, 1)], [8])
        >>> one = torch.ones(1, 4, 1, 1)
        >>> cls, sizes = one[:, :1], torch.tensor([[8, 8]])
        >>> best = select_candidates([cls], [one], [cls], levels, sizes)
        >>> best.boxes
        tensor([[[-4., -4., 12., 12.]]])
    """
    name = "select_candidates"
    check_maps(name, "logits", logits, "K")
    for level in logits:  # kernels index (point, class) pairs with 32 bits
        good = level[:1].numel() < 2**32
        check(good, name, "logits[l] must have fewer than 2^32 elements per image", level)
    check_maps(name, "ltrb", ltrb, 4, like=logits)
    check_maps(name, "quality", quality, 1, like=logits)
    check_levels(name, levels, logits)
    sizes = [logits[0].shape[0], 2]
    check_tensor(name, "image_sizes", image_sizes, sizes, [torch.int64], "cast with .long()")
    check_same_device(name, logits=logits[0], image_sizes=image_sizes)
    check_number(name, "score_threshold", score_threshold, 0, 1)
    check_count(name, "topk", topk)
    check_flags(
        name,
        threshold_with_quality=threshold_with_quality,
        rank_with_quality=rank_with_quality,
        clip=clip,
        drop_empty=drop_empty,
    )
    check_pixel_extent(name, pixel_extent)
    check_choice(name, "score_rule", score_rule, SCORE_RULES)
    return Candidates(
        *_op(
            [x.detach() for x in logits],
            [x.detach() for x in ltrb],
            [x.detach() for x in quality],
            image_sizes,
            list(levels.strides),
            list(chain.from_iterable(levels.pitches)),
            levels.offset,
            float(score_threshold),
            topk,
            threshold_with_quality,
            rank_with_quality,
            score_rule,
            clip,
            pixel_extent,
            drop_empty,
        )
    )


def _fake(logits, ltrb, quality, image_sizes, strides, pitches, offset, threshold, topk, *_):
    first = logits[0]
    n = sum(min(topk, t.shape[1] * t.shape[2] * t.shape[3]) for t in logits)
    return (
        first.new_empty(first.shape[0], n, 4, dtype=torch.float32),
        first.new_empty(first.shape[0], n, dtype=torch.float32),
        first.new_empty(first.shape[0], n, dtype=torch.int64),
    )


_op = define_op(
    "select_candidates(Tensor[] logits, Tensor[] ltrb, Tensor[] quality, Tensor image_sizes, "
    "int[] strides, SymInt[] pitches, float offset, float score_threshold, int topk, "
    "bool threshold_with_quality, bool rank_with_quality, str score_rule, bool clip, "
    "int pixel_extent=0, bool drop_empty=False) -> (Tensor, Tensor, Tensor)",
    reference.select_candidates,
    _fake,
)
