"""Property tests of every op on random cases (strategies.py).

A normal run tests a sample. ``pytest -m slow tests/ops/test_properties.py`` tests 20,000 cases per
op and implementation.
"""

import math

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fcos_d2.ops import (
    assign_targets,
    batched_nms,
    batched_nms_padded,
    box_loss,
    point_coordinates,
    reference,
    select_candidates,
    sigmoid_focal_loss,
)

from . import oracles, strategies
from .strategies import MANY, for_all


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(as_integers), b.view(as_integers))


def assert_within_one_ulp(got: torch.Tensor, want: torch.Tensor) -> None:
    """Checks that half-precision numbers are equal or adjacent, and finite in the same places.

    Allows differences up to 2^-124, where float32 becomes subnormal.
    """
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    ranks = []
    for x in (got[finite], want[finite]):
        bits = x.view(torch.int16).int()
        ranks.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    tiny = (got[finite].double() - want[finite].double()).abs() <= 2**-124
    assert (tiny | ((ranks[0] - ranks[1]).abs() <= 1)).all()


def assert_gradient(got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> None:
    """Compares a gradient with ``want``, the gradient in float64."""
    if got.dtype in (torch.float16, torch.bfloat16):
        assert_within_one_ulp(got, want.to(got.dtype))
        return
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    torch.testing.assert_close(got[finite].double(), want[finite], rtol=rtol, atol=atol)


def layout_of(x: torch.Tensor) -> list[int]:
    """Returns the strides of dimensions larger than 1."""
    return [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel() > 0]


def gradients(losses, upstream, maps):
    """Returns the gradients of all maps; checks that each has the memory layout of its map."""
    grads = torch.autograd.grad(sum(u * x for u, x in zip(upstream, losses, strict=True)), maps)
    for grad, given_map in zip(grads, maps, strict=True):
        assert grad.dtype == given_map.dtype and grad.shape == given_map.shape
        assert layout_of(grad) == layout_of(torch.empty_like(given_map))
    return grads


# ---- assign_targets ----


@MANY
def test_assignment_equals_oracle_and_reference_bitwise(cases):
    def holds(case):
        tensors = case.tensors()
        options = {"num_classes": strategies.NUM_CLASSES, **case.options}
        targets = assign_targets(*tensors, case.levels, case.ranges, **options)
        labels, matched, ambiguous = oracles.assign(*tensors, case.levels, case.ranges, **options)
        assert torch.equal(targets.labels, labels) and torch.equal(targets.matched, matched)
        found = torch.stack((matched >= 0, ambiguous), dim=-1)
        counts = [level.sum(dim=1) for level in found.split(case.levels.points_per_level, dim=1)]
        assert torch.equal(targets.counts, torch.stack(counts, dim=1).int())
        specified = reference.assign_targets(
            *tensors,
            [n for shape in case.levels.shapes for n in shape],
            list(case.levels.strides),
            [n for pitch in case.levels.pitches for n in pitch],
            case.levels.offset,
            [float(bound) for bounds in case.ranges for bound in bounds],
            **options,
        )
        for name, got, want in zip(targets._fields, targets, specified, strict=True):
            assert same_bits(got, want), name

    for_all(strategies.assign_cases, cases, holds)


# ---- sigmoid_focal_loss ----


def focal_loss_tolerance(logits, implementation) -> float:
    """Returns the relative tolerance of the loss."""
    if logits[0].dtype == torch.float64:
        return 1e-8  # torch's softplus of x > 20 is x
    # The interpreter's exp and 1/x are as inexact as PTX allows, exp more so for half-precision
    # logits, and p^2 softplus(z) triples the error. In long sums, errors cancel.
    few = sum(level.numel() for level in logits) < 100
    if not few or implementation not in ("ptx", "cuda"):
        return 1e-6
    return 1.5e-6 if logits[0].dtype == torch.float32 else 6e-6


@MANY
def test_focal_loss_and_gradient_match_float64(cases, implementation):
    def holds(case):
        logits, labels = case.tensors()
        maps = [x.requires_grad_() for x in logits]
        wide = [x.detach().double() for x in logits]
        loss = sigmoid_focal_loss(maps, labels, case.alpha, case.gamma)
        want = reference.sigmoid_focal_loss(wide, labels, case.alpha, case.gamma)
        exact = case.dtype == torch.float64
        assert loss.dtype == (torch.float64 if exact else torch.float32)
        # Below 1e-30, powers of a probability underflow in float32.
        rtol = focal_loss_tolerance(logits, implementation)
        torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=1e-30, equal_nan=True)
        upstream = torch.tensor(case.upstream, dtype=loss.dtype)
        # The gradient at an infinite logit is the limit, or not finite.
        moderate = [x.clamp(-1e4, 1e4) for x in wide]
        wants = reference.sigmoid_focal_loss_backward(
            upstream.double(), moderate, labels, case.alpha, case.gamma
        )
        tolerance = (1e-8, 1e-12) if exact else (1e-6, 1e-7)
        for grad, want, x in zip(gradients([loss], [upstream], maps), wants, wide, strict=True):
            is_lost = x.isinf() & ~grad.isfinite()
            assert_gradient(grad, torch.where(is_lost, math.nan, want), *tolerance)
        if case.logits != "broken":
            assert loss.isfinite()

    for_all(strategies.focal_cases, cases, holds)


@pytest.mark.usefixtures("assertions_can_be_caught")
@MANY
def test_label_out_of_range_is_an_error(cases):
    def holds(case, label, where):
        logits, labels = case.tensors()
        assume(labels.numel() > 0)
        labels.view(-1)[where % labels.numel()] = -2 if label < 0 else case.num_classes + label
        with pytest.raises(RuntimeError, match="sigmoid_focal_loss: labels must lie in"):
            sigmoid_focal_loss(logits, labels)

    bad = st.tuples(strategies.focal_cases, st.sampled_from([-1, 1, 1000]), st.integers(0, 999))
    for_all(bad, cases // 10, lambda all_three: holds(*all_three))


# ---- box_loss ----


def perturbed(maps, eps, g):
    """Perturbs every number by up to four times its rounding error."""
    return [x * (1 + (2 * torch.rand(x.shape, generator=g) - 1) * 4 * eps) for x in maps]


def box_loss_in_float64(ltrb, quality, targets, upstream, options):
    """Returns both losses and all gradients."""
    losses = reference.box_loss(ltrb, quality, *targets[1:4], **options)
    upstream = [u.double() for u in upstream]
    boxes, qualities = reference.box_loss_backward(
        *upstream, ltrb, quality, *targets[1:4], **options
    )
    return [*losses, *boxes, *qualities]


def assert_within_input_rounding(got, want, neighbors, rtol, size=1.0) -> None:
    """Checks that errors are at most a few times the effect of rounding the inputs."""
    want_here = want.to(got.dtype)
    spread = sum((x - want).abs() for x in neighbors)
    half_unit = torch.finfo(got.dtype).eps * want.abs() if got.dtype.itemsize == 2 else 0
    allowed = rtol * (size + want.abs()) + 2 * spread + half_unit
    good = ((got.double() - want).abs() <= allowed) | (got == want_here)
    assert good.all(), (got[~good], want[~good], allowed[~good])


@MANY
def test_box_loss_and_gradient_match_float64(cases):
    def holds(case):
        ltrb, quality, targets = case.tensors()
        maps = [x.requires_grad_() for x in (*ltrb, *quality)]
        options = {**case.options, "smoothing": case.smoothing[: len(ltrb)]}
        losses = box_loss(ltrb, quality, targets, **options)
        upstream = [torch.tensor(u, dtype=losses[0].dtype) for u in case.upstream]
        wide = [[x.detach().double() for x in level] for level in (ltrb, quality)]
        wants = box_loss_in_float64(*wide, targets, upstream, options)
        # 1 - IoU of good boxes and distances near the sides of the target amplify rounding errors.
        g, eps = strategies.generator(case.seed), torch.finfo(losses[0].dtype).eps
        neighbors = [
            box_loss_in_float64(*(perturbed(x, eps, g) for x in wide), targets, upstream, options)
            for _ in range(4)
        ]
        results = [*losses, *gradients(losses, upstream, maps)]
        # torch's cross-entropy of a large logit is the difference of two large numbers.
        logits = torch.cat([x.flatten(1) for x in wide[1]], dim=1)[targets.matched >= 0]
        sizes = [1.0, 1 + logits.abs().sum().item(), *[1.0] * len(maps)]
        rtol = max(10 * eps, 1e-10)
        for got, want, size, *near in zip(results, wants, sizes, *neighbors, strict=True):
            assert_within_input_rounding(got, want, near, rtol, size)

    for_all(strategies.box_cases, cases, holds)


# ---- select_candidates ----


def split_levels(case, candidates):
    """Yields (image, level, its slots of candidates) for every image and level."""
    sizes = [n * case.num_classes for n in case.levels.points_per_level]
    slots = [min(case.options["topk"], size) for size in sizes]
    for image in range(case.images):
        parts = zip(*(column[image].split(slots) for column in candidates), strict=True)
        for level, part in enumerate(parts):
            yield image, level, part


def candidates_and_points(case, maps, sizes):
    """Returns the candidates, and the same ones with empty boxes, which locate their points."""
    logits, ltrb, quality = maps
    found = select_candidates(*maps, case.levels, sizes, **case.options)
    options = {**case.options, "clip": False, "drop_empty": False}
    zeros = [torch.zeros_like(x) for x in ltrb]
    return found, select_candidates(logits, zeros, quality, case.levels, sizes, **options)


@MANY
def test_candidates_are_the_best_of_each_level(cases, implementation):
    def holds(case):
        *maps, sizes = case.tensors()
        found, places = candidates_and_points(case, maps, sizes)
        points = point_coordinates(case.levels).split(case.levels.points_per_level)
        for (image, level, slots), (_, _, place) in zip(
            split_levels(case, found), split_levels(case, places), strict=True
        ):
            count = int((place[2] >= 0).sum())
            corners, scores, classes = (column[:count] for column in place)
            assert (place[2][count:] == -1).all()
            point = (corners[:, None, :2] == points[level]).all(dim=-1).nonzero()[:, 1]
            assert len(point) == count
            logits, ltrb, quality = (level_maps[level][image] for level_maps in maps)
            pair = (point * case.num_classes + classes).numpy()
            oracles.check_selection(pair, scores, logits, quality, len(place[2]), case.options)
            if implementation != "reference":
                # torch's sigmoid of equal numbers may differ by an ulp at the end of a tensor.
                oracles.check_tie_order(pair, logits, quality)
            boxes, kept = decode(case, ltrb, points[level][point], point, level, sizes[image])
            wanted = (
                torch.where(kept[:, None], boxes, 0.0),
                torch.where(kept, scores, 0.0),
                torch.where(kept, classes, -1),
            )
            for column, want, empty in zip(slots, wanted, (0, 0, -1), strict=True):
                assert torch.equal(column[:count], want) and (column[count:] == empty).all()
        if case.logits in ("ties", "equal"):
            check_equal_to_reference(case, maps, sizes, found)

    for_all(strategies.select_cases, cases, holds)


def decode(case, ltrb, center, point, level, size):
    """Returns float32 boxes, on which all implementations agree bitwise, and which are kept."""
    distances = ltrb.float().flatten(1).t()[point] * case.levels.strides[level]
    boxes = torch.cat((center - distances[:, :2], center + distances[:, 2:]), dim=1)
    kept = boxes.isfinite().all(dim=1)
    if case.options["clip"]:
        limit = (size.flip(0) - case.options["pixel_extent"]).repeat(2).float()
        boxes = torch.minimum(boxes.clamp(min=0), limit)
    if case.options["drop_empty"]:
        kept &= (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return boxes, kept


def check_equal_to_reference(case, maps, sizes, candidates):
    """Checks that ties go to the lower (point, class)."""
    pitches = [n for pitch in case.levels.pitches for n in pitch]
    geometry = list(case.levels.strides), pitches, case.levels.offset
    boxes, scores, classes = reference.select_candidates(*maps, sizes, *geometry, **case.options)
    assert torch.equal(candidates.classes, classes) and torch.equal(candidates.boxes, boxes)
    torch.testing.assert_close(candidates.scores, scores, rtol=1e-6, atol=1e-7)


# ---- batched_nms ----


def is_decided_by_rounding(case, threshold, inter, union) -> bool:
    """Returns whether rounding matters, which it does not for integers and binary fractions."""
    exact = case.boxes == "small_grid" and threshold in (0.0, 0.25, 0.5, 0.75, 1.0)
    return case.boxes == "broken" or (not exact and oracles.is_close_call(inter, union, threshold))


@MANY
def test_kept_boxes_match_a_greedy_search_in_float64(cases):
    def holds(case):
        boxes, scores, classes = case.tensors()
        kept = batched_nms(boxes, scores, classes, case.threshold)
        assert kept.dtype == torch.int64
        specified = reference.batched_nms(boxes, scores, classes, case.threshold)
        assert torch.equal(kept, specified)
        inter, union = oracles.overlaps(boxes)
        if not is_decided_by_rounding(case, case.threshold, inter, union):
            rivals = (classes[:, None] == classes[None]).numpy()
            order = oracles.order_of(scores)
            assert kept.tolist() == oracles.greedy(order, inter, union, rivals, case.threshold)
        again = batched_nms(boxes[kept], scores[kept], classes[kept], case.threshold)
        assert again.tolist() == list(range(len(kept)))  # idempotent
        for label in classes.unique():  # classes are independent
            there = (classes == label).nonzero()[:, 0]
            alone = batched_nms(boxes[there], scores[there], classes[there], case.threshold)
            assert torch.equal(there[alone], kept[classes[kept] == label])
        if case.scores == "distinct":
            shuffle = torch.randperm(case.count, generator=strategies.generator(case.seed))
            shuffled = (x[shuffle] for x in (boxes, scores, classes))
            assert torch.equal(shuffle[batched_nms(*shuffled, case.threshold)], kept)

    for_all(strategies.nms_cases, cases, holds)


@MANY
def test_padded_detections_are_a_prefix_of_the_greedy_search(cases):
    def holds(case):
        boxes, scores, classes = case.tensors()
        found = batched_nms_padded(boxes, scores, classes, **case.options)
        assert found.boxes.shape == (case.images, case.options["max_detections"], 4)
        for image, count in enumerate(found.counts.tolist()):
            best = [column[image, :count] for column in found[:3]]
            empty = [column[image, count:] for column in found[:3]]
            assert (empty[0] == 0).all() and (empty[1] == 0).all() and (empty[2] == -1).all()
            assert (best[2] >= 0).all() and not best[1].isnan().any()
            given_image = boxes[image], scores[image], classes[image]
            if case.options["method"] != "hard":
                if case.boxes != "broken" and case.scores != "broken":
                    oracles.check_soft_nms(*given_image, best, case.options)
            else:
                check_hard(case, given_image, best)

    for_all(strategies.padded_cases, cases, holds)


def check_hard(case, given_image, best):
    """Checks for a prefix of the flat form's result on the valid boxes."""
    boxes, scores, classes = given_image
    there = ((classes >= 0) & ~scores.isnan() & (scores > -math.inf)).nonzero()[:, 0]
    groups = torch.zeros_like(classes) if case.options["class_agnostic"] else classes
    extent, threshold = case.options["pixel_extent"], case.options["iou_threshold"]
    larger = boxes + torch.tensor([0, 0, extent, extent])
    kept = there[reference.batched_nms(larger[there], scores[there], groups[there], threshold)]
    kept = kept[: case.options["max_detections"]]
    for column, given_column in zip(best, given_image, strict=True):
        torch.testing.assert_close(column, given_column[kept], rtol=0, atol=0, equal_nan=True)
