"""box_loss: hand-computed cases, torchvision, gradients, and invalid input."""

import math

import pytest
import torch

from fcos_d2.ops import Targets, box_loss
from fcos_d2.ops.reference import iou_loss

from . import inputs

LOSS_TYPES = ["iou", "linear_iou", "giou", "diou", "ciou"]


def one_point(pred, target, quality=0.0, centerness=1.0, **options):
    """Returns the box loss and the quality loss of a single positive point."""
    pred = torch.tensor(pred).view(1, 4, 1, 1)
    targets = Targets(
        labels=None,
        matched=torch.zeros(1, 1, dtype=torch.int32),
        ltrb=torch.tensor(target).view(1, 1, 4),
        centerness=torch.tensor([[centerness]]),
        counts=None,
    )
    losses = box_loss([pred], [torch.full((1, 1, 1, 1), quality)], targets, **options)
    return [loss.item() for loss in losses]


# Prediction 2 x 2 and target 4 x 4 around the point: intersection 4, union 16, IoU 1/4.
SMALL, LARGE = [1.0] * 4, [2.0] * 4
# Prediction 2 x 2, target the same box moved right by 1: intersection 2, union 6, hull 3 x 2.
LEFT, RIGHT = [1.0, 1.0, 1.0, 1.0], [0.0 + 1e-9, 1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    "loss_type, expected",
    [
        ("iou", math.log(4)),
        ("linear_iou", 0.75),
        ("giou", 0.75),
        ("diou", 0.75),
        ("ciou", 0.75),
    ],
)
def test_concentric_boxes(loss_type, expected):
    assert one_point(SMALL, LARGE, loss_type=loss_type)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "loss_type, expected",
    [
        ("iou", math.log(3)),
        ("linear_iou", 2 / 3),
        ("giou", 2 / 3 + 0 / 6),  # the union of 6 fills the hull 3 x 2
        ("diou", 2 / 3 + 1 / 13),  # centers 1 apart, diagonal^2 = 9 + 4
        ("ciou", 2 / 3 + 1 / 13),  # equal aspect ratios
    ],
)
def test_shifted_boxes(loss_type, expected):
    assert one_point(LEFT, RIGHT, loss_type=loss_type)[0] == pytest.approx(expected, rel=1e-5)


def test_giou_adds_the_uncovered_fraction_of_the_hull():
    # 4 x 2 and 2 x 4 around one point: intersection 4, union 12, hull 16.
    loss, _ = one_point([2.0, 1.0, 2.0, 1.0], [1.0, 2.0, 1.0, 2.0], loss_type="giou")
    assert loss == pytest.approx(1 - 4 / 12 + 4 / 16, rel=1e-5)


def test_ciou_adds_the_aspect_ratio():
    loss, _ = one_point([2.0, 1.0, 2.0, 1.0], [1.0, 2.0, 1.0, 2.0], loss_type="ciou")
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    assert loss == pytest.approx(2 / 3 + v * v / (2 / 3 + v), rel=1e-5)


def test_smoothing_is_added_to_intersection_and_union():
    assert one_point(SMALL, LARGE, loss_type="linear_iou", smoothing=1.0)[0] == pytest.approx(
        1 - 5 / 17, rel=1e-5
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("error", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (1, -1, -1, 1), (-1, 1, -1, 1), (-1, -1, -1, -1)])
def test_losses_of_good_boxes_are_accurate(loss_type, error, signs):
    truth = torch.tensor([3.0, 5.0, 4.0, 2.0])
    pred = truth * (1 + error * torch.tensor([0.3, 0.7, 0.9, 0.4]) * torch.tensor(signs))
    expected, _, _ = iou_loss(pred.double(), truth.double(), loss_type)
    loss, _ = one_point(pred.tolist(), truth.tolist(), loss_type=loss_type)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_disjoint_boxes_have_a_finite_loss():
    pred, target = [-3.0, 1.0, 4.0, 1.0], [1.0] * 4  # the point is outside the prediction
    assert one_point(pred, target, loss_type="iou")[0] == pytest.approx(-math.log(1e-6), rel=1e-4)
    for loss_type in LOSS_TYPES:
        assert math.isfinite(one_point([0.0] * 4, LARGE, loss_type=loss_type)[0])


def test_iou_loss_of_a_huge_prediction_is_only_flat_without_smoothing():
    pred = torch.full((1, 4, 1, 1), 1e4, requires_grad=True)
    ltrb, weight = torch.ones(1, 1, 4), torch.ones(1, 1)
    targets = Targets(None, torch.zeros(1, 1, dtype=torch.int32), ltrb, weight, None)
    found = []
    for smoothing in (1.0, 0.0):
        quality = [torch.zeros(1, 1, 1, 1)]
        loss, _ = box_loss([pred], quality, targets, loss_type="iou", smoothing=smoothing)
        found.append((loss.item(), torch.autograd.grad(loss, pred)[0].unique().item()))
    assert found[0] == pytest.approx((math.log((4e8 + 1) / (4 + 1)), 2e4 / 4e8), rel=1e-4)
    assert found[1] == pytest.approx((-math.log(1e-6), 0))


def test_iou_loss_of_an_inverted_box_is_finite():
    assert one_point([-3.0, 5.0, -3.0, 5.0], LARGE, loss_type="iou", smoothing=1.0)[0] == (
        pytest.approx(-math.log(1e-6))
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_nan_propagates(loss_type, smoothing):
    loss, _ = one_point([math.nan] * 4, LARGE, loss_type=loss_type, smoothing=smoothing)
    assert math.isnan(loss)


def test_box_loss_is_weighted_by_centerness_by_default():
    weighted, _ = one_point(SMALL, LARGE, centerness=0.5)
    plain, _ = one_point(SMALL, LARGE, centerness=0.5, weight_by_centerness=False)
    assert weighted == pytest.approx(0.375, rel=1e-5) and plain == pytest.approx(0.75, rel=1e-5)


def test_quality_target_is_centerness_or_iou():
    x, sigmoid = 0.7, 1 / (1 + math.exp(-0.7))

    def cross_entropy(target):
        return -target * math.log(sigmoid) - (1 - target) * math.log(1 - sigmoid)

    _, by_centerness = one_point(SMALL, LARGE, quality=x, centerness=0.6)
    _, by_iou = one_point(SMALL, LARGE, quality=x, centerness=0.6, quality_type="iou")
    assert by_centerness == pytest.approx(cross_entropy(0.6), rel=1e-5)
    assert by_iou == pytest.approx(cross_entropy(0.25), rel=1e-5)


@pytest.mark.parametrize(
    "loss_type, peer",
    [
        ("giou", "generalized_box_iou_loss"),
        ("diou", "distance_box_iou_loss"),
        ("ciou", "complete_box_iou_loss"),
    ],
)
def test_losses_match_torchvision(loss_type, peer):
    pred = torch.rand(200, 4, dtype=torch.float64) * 5
    target = torch.rand(200, 4, dtype=torch.float64) * 5 + 0.1
    sign = torch.tensor([-1, -1, 1, 1])
    peer = getattr(pytest.importorskip("torchvision").ops, peer)
    expected = peer(8 * sign * pred + 50, 8 * sign * target + 50)
    loss, _, _ = iou_loss(pred, target, loss_type)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_gradient_is_the_derivative_of_the_value(loss_type, smoothing):
    target = torch.rand(20, 4, dtype=torch.float64) * 3 + 0.1
    pred = (torch.rand(20, 4, dtype=torch.float64) * 3 + 0.05).requires_grad_()
    loss, iou, slope = iou_loss(pred, target, loss_type, smoothing)
    if loss_type == "ciou":  # its weight is treated as a constant, so differentiate by hand
        aspect = loss - iou_loss(pred, target, "diou", smoothing)[0]
        w, h = pred[:, 0] + pred[:, 2], pred[:, 1] + pred[:, 3]
        tw, th = target[:, 0] + target[:, 2], target[:, 1] + target[:, 3]
        v = 4 / math.pi**2 * (torch.atan(tw / th) - torch.atan(w / h)) ** 2
        alpha = (v / (1 - iou + v)).detach()
        torch.testing.assert_close(aspect, alpha * v, rtol=1e-5, atol=1e-9)
        loss = iou_loss(pred, target, "diou", smoothing)[0] + alpha * v
    (expected,) = torch.autograd.grad(loss.sum(), pred)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


def test_iou_quality_has_no_gradient_with_respect_to_boxes():
    levels = inputs.pyramid(64, 96, 2)
    targets = inputs.targets(levels, [3, 2], 4, height=64, width=96)
    _, ltrb, quality = inputs.predictions(levels, 2, 4)
    ltrb = [x.requires_grad_() for x in ltrb]
    _, quality_loss = box_loss(ltrb, quality, targets, quality_type="iou")
    assert all((g == 0).all() for g in torch.autograd.grad(quality_loss, ltrb))


def test_nan_predictions_of_background_points_are_ignored():
    levels = inputs.pyramid(64, 64, 1)
    targets = inputs.targets(levels, [2], 4, height=64, width=64)
    _, ltrb, quality = inputs.predictions(levels, 1, 4)
    background = (targets.matched < 0).view(1, 1, *levels.shapes[0])
    broken = [torch.where(background, math.nan, x).requires_grad_() for x in (ltrb[0], quality[0])]
    losses = box_loss(broken[:1], broken[1:], targets)
    torch.testing.assert_close(losses, box_loss(ltrb, quality, targets))
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(losses), broken))


def test_no_positive_points_give_zero_losses_with_a_gradient():
    levels = inputs.pyramid(64, 64, 2)
    targets = inputs.targets(levels, [0, 0], 4)
    _, ltrb, quality = inputs.predictions(levels, 2, 4)
    maps = [x.requires_grad_() for x in (*ltrb, *quality)]
    losses = box_loss(maps[:2], maps[2:], targets)
    assert losses[0] == 0 and losses[1] == 0
    assert all((g == 0).all() for g in torch.autograd.grad(sum(losses), maps))


def test_second_derivative_is_an_error():
    levels = inputs.pyramid(64, 64, 1)
    targets = inputs.targets(levels, [2], 4, height=64, width=64)
    _, ltrb, quality = inputs.predictions(levels, 1, 4)
    x = ltrb[0].requires_grad_()
    (grad,) = torch.autograd.grad(box_loss([x], quality, targets)[0], x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        grad.sum().backward()


LTRB, QUALITY = torch.ones(1, 4, 2, 2), torch.ones(1, 1, 2, 2)
TARGETS = Targets(
    None, torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 4, 4), torch.ones(1, 4), None
)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([LTRB[:, :3]], [QUALITY], TARGETS), {}, r"ltrb\[l\] must be .* Tensor\[B, 4, H, W\]"),
        (([LTRB], [QUALITY] * 2, TARGETS), {}, r"quality must have \(batch, height, width\)"),
        (([LTRB], [QUALITY.half()], TARGETS), {}, "quality must have the dtype of ltrb"),
        (([LTRB], [QUALITY], TARGETS._replace(matched=torch.zeros(1, 4))), {},
         r"targets.matched must be int32 Tensor\[1, 4\], got float32"),
        (([LTRB], [QUALITY], TARGETS._replace(ltrb=torch.ones(1, 3, 4))), {}, r"targets.ltrb must"),
        (([LTRB], [QUALITY], TARGETS), {"loss_type": "l1"},
         "loss_type must be one of iou, linear_iou, giou, diou, ciou, got str 'l1'"),
        (([LTRB], [QUALITY], TARGETS), {"quality_type": "ctr"}, "quality_type must be one of"),
        (([LTRB], [QUALITY], TARGETS), {"smoothing": [1.0, 1.0]}, "smoothing must be one number"),
        (([LTRB], [QUALITY], TARGETS), {"smoothing": -1.0}, "smoothing must be one number"),
    ],
)  # fmt: skip
def test_error_names_the_invalid_argument(arguments, options, message):
    with pytest.raises(ValueError, match=f"box_loss: .*{message}"):
        box_loss(*arguments, **options)
