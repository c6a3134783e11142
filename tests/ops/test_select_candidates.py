"""select_candidates: hand-computed cases and invalid input."""

import math

import pytest
import torch

from fcos_d2.ops import make_levels, select_candidates

SIZES = torch.tensor([[16, 16]])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def select(probabilities, qualities, ltrb=1.0, **options):
    """Selects from one image, one level, stride 8; probabilities [K][H][W], qualities [H][W]."""
    cls = torch.logit(torch.tensor(probabilities, dtype=torch.float64))[None].float()
    quality = torch.logit(torch.tensor(qualities, dtype=torch.float64))[None, None].float()
    _, _, h, w = cls.shape
    levels = make_levels([(h, w)], [8])
    maps = torch.full((1, 4, h, w), float(ltrb))
    return select_candidates([cls], [maps], [quality], levels, SIZES, **options)


def test_boxes_scores_and_classes_of_candidates():
    best = select([[[0.9, 0.04]], [[0.01, 0.36]]], [[0.4, 0.25]], ltrb=0.5)
    assert best.classes.tolist() == [[0, 1, -1, -1]]
    assert best.scores[0].tolist() == pytest.approx([0.6, 0.3, 0, 0], rel=1e-5)
    assert best.boxes[0].tolist() == [[0, 0, 8, 8], [8, 0, 16, 8], [0] * 4, [0] * 4]


@pytest.mark.parametrize("rule, expected", [("sqrt", 0.6), ("product", 0.36), ("cls", 0.9)])
def test_score_rule(rule, expected):
    score = select([[[0.9]]], [[0.4]], score_rule=rule).scores[0, 0].item()
    assert score == pytest.approx(expected, rel=1e-5)


def test_threshold_applies_to_class_probability_or_product():
    probabilities, qualities = [[[0.3, 0.1]]], [[0.1, 0.9]]
    by_class = select(probabilities, qualities, score_threshold=0.2)
    by_product = select(probabilities, qualities, score_threshold=0.05, threshold_with_quality=True)
    assert by_class.boxes[0, 0, 0] == -4 and (by_class.classes >= 0).sum() == 1
    assert by_product.boxes[0, 0, 0] == 4 and (by_product.classes >= 0).sum() == 1


def test_threshold_is_strict():
    assert (select([[[0.5]]], [[0.5]], score_threshold=0.5).classes == -1).all()


def test_ranking_uses_product_or_class_probability():
    probabilities, qualities = [[[0.5, 0.4]]], [[0.2, 0.9]]
    by_product = select(probabilities, qualities, topk=1)
    by_class = select(probabilities, qualities, topk=1, rank_with_quality=False)
    assert by_product.boxes[0, 0, 0] == 4 and by_class.boxes[0, 0, 0] == -4
    assert by_class.boxes.shape == (1, 1, 4)


def test_ties_are_ordered_by_point_then_class():
    best = select([[[0.5] * 3]] * 2, [[0.5] * 3], topk=4)
    assert best.classes.tolist() == [[0, 1, 0, 1]]
    assert best.boxes[0, :, 0].tolist() == [-4, -4, 4, 4]


def test_clip_uses_the_unpadded_size_of_each_image():
    cls = torch.full((2, 1, 2, 2), 3.0)
    levels = make_levels([(2, 2)], [8])
    sizes = torch.tensor([[16, 16], [10, 12]])
    ltrb = [torch.full((2, 4, 2, 2), 9.0)]
    for extent in (0, 1):
        best = select_candidates([cls], ltrb, [cls], levels, sizes, clip=True, pixel_extent=extent)
        assert best.boxes[0].unique(dim=0).tolist() == [[0, 0, 16 - extent, 16 - extent]]
        assert best.boxes[1].unique(dim=0).tolist() == [[0, 0, 12 - extent, 10 - extent]]


@pytest.mark.parametrize("clip", [False, True])
def test_boxes_without_area_are_dropped_on_request_after_clipping(clip):
    # The second point predicts a box without width, the third one beyond the image.
    levels, cls = make_levels([(1, 3)], [8]), torch.full((1, 1, 1, 3), 3.0)
    ltrb = torch.tensor([[0.25] * 4, [0.0, 1, 0, 1], [0.25] * 4]).T.reshape(1, 4, 1, 3)
    arguments = [cls], [ltrb], [cls], levels, torch.tensor([[8, 16]])
    kept, dropped = (
        select_candidates(*arguments, clip=clip, drop_empty=drop) for drop in (False, True)
    )
    assert kept.classes.tolist() == [[0, 0, 0]]
    assert dropped.classes.tolist() == [[0, -1, -1 if clip else 0]]
    assert dropped.boxes[0, 1].tolist() == [0] * 4 and dropped.scores[0, 1] == 0
    assert torch.equal(dropped.boxes[0, 0], kept.boxes[0, 0])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
def test_non_finite_boxes_are_dropped_and_never_clipped_to_the_image(clip, bad):
    best = select([[[0.9]]], [[0.5]], ltrb=bad, clip=clip)
    assert best.classes.tolist() == [[-1]] and best.boxes.tolist() == [[[0] * 4]]


def test_no_and_all_pairs_pass():
    empty = select([[[0.01] * 4] * 4] * 3, [[0.5] * 4] * 4)
    assert (empty.classes == -1).all() and (empty.scores == 0).all() and (empty.boxes == 0).all()
    full = select([[[0.9] * 4] * 4] * 3, [[0.5] * 4] * 4, topk=10_000)
    assert full.classes.shape == (1, 48) and (full.classes >= 0).all()


def test_nan_never_passes_and_infinity_does():
    levels = make_levels([(1, 3)], [8])
    cls = torch.tensor([math.nan, math.inf, 0.0]).view(1, 1, 1, 3)
    quality = torch.tensor([0.0, 0.0, math.nan]).view(1, 1, 1, 3)
    for with_quality in (True, False):
        best = select_candidates(
            [cls], [torch.ones(1, 4, 1, 3)], [quality], levels, SIZES,
            threshold_with_quality=with_quality, rank_with_quality=with_quality,
        )  # fmt: skip
        assert (best.classes[0] >= 0).tolist() == [True, False, False]
        assert best.boxes[0, 0, 0] == 4 and best.scores.isfinite().all()


MAP = torch.zeros(1, 3, 2, 2)
GOOD = {
    "logits": [MAP],
    "ltrb": [torch.zeros(1, 4, 2, 2)],
    "quality": [MAP[:, :1]],
    "levels": make_levels([(2, 2)], [8]),
    "image_sizes": SIZES,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": MAP}, "logits must be a non-empty list"),
        ({"ltrb": [MAP]}, r"ltrb\[l\] must be .* Tensor\[B, 4, H, W\], got float32"),
        ({"quality": [torch.zeros(1, 1, 2, 3)]}, r"quality must have \(batch, height, width\)"),
        ({"levels": make_levels([(2, 3)], [8])}, "levels.shapes must be those of the maps"),
        ({"levels": None}, "levels must be fcos_d2.ops.Levels"),
        ({"image_sizes": SIZES.float()}, r"image_sizes must be int64 Tensor\[1, 2\]"),
        ({"image_sizes": SIZES.repeat(2, 1)}, r"image_sizes must be int64 Tensor\[1, 2\]"),
        ({"score_threshold": 1.5}, "score_threshold must be a number in"),
        ({"score_threshold": math.nan}, "score_threshold must be a number in"),
        ({"topk": 0}, "topk must be an integer >= 1"),
        ({"score_rule": "mean"}, "score_rule must be one of sqrt, product, cls"),
        ({"pixel_extent": 2}, "pixel_extent must be 0 or 1, got int 2"),
        ({"drop_empty": 1}, "drop_empty must be True or False"),
    ],
)
def test_error_names_the_invalid_argument(change, message):
    with pytest.raises(ValueError, match=f"select_candidates: {message}"):
        select_candidates(**{**GOOD, **change})
