"""Compares losses, normalizers and statistics of FCOSLoss with numbers computed by hand.

By default, one image of 8 x 24 pixels has one level with points (4, 4), (12, 4) and (20, 4). A box
around the whole image makes all three positive, with centerness 1/sqrt(5), 1 and 1/sqrt(5).
"""

import math

import pytest
import torch
from detectron2.utils import comm

from fcos_d2.modeling import FCOSLoss, GroundTruth, PointGrid, Predictions

LEVELS = PointGrid([8]).levels([torch.empty(1, 1, 1, 3)], torch.empty(1, 3, 8, 24))
WHOLE = [0.0, 0.0, 24.0, 8.0]
SIDE = 1 / math.sqrt(5)
LN2 = math.log(2)


def make_loss(**options) -> FCOSLoss:
    settings = dict(strides=[8], sizes_of_interest=[], center_radius=0, iou_smooth=0)
    return FCOSLoss(**(settings | dict(num_classes=2, loc_loss_type="linear_iou") | options))


def ground_truth(*images) -> GroundTruth:
    """Packs one list of (box, class) per image."""
    boxes = [box for image in images for box, _ in image]
    classes = [label for image in images for _, label in image]
    counts = torch.tensor([0, *map(len, images)])
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return GroundTruth(boxes, torch.tensor(classes, dtype=torch.int64), counts.cumsum(0))


ONE_BOX = ground_truth([(WHOLE, 0)])
NOTHING = ground_truth([])


def predictions(images: int = 1, middle: float = 1.0) -> Predictions:
    """Returns zero logits, and the distances of WHOLE, scaled by ``middle`` at the middle point."""
    ltrb = torch.tensor([[0.5, 1.5, 2.5], [0.5] * 3, [2.5, 1.5, 0.5], [0.5] * 3])
    ltrb[:, 1] *= middle
    ltrb = ltrb.view(1, 4, 1, 3).repeat(images, 1, 1, 1)
    maps = torch.zeros(images, 2, 1, 3), ltrb, torch.zeros(images, 1, 1, 3)
    return Predictions(*([level.requires_grad_()] for level in maps), [])


def to_floats(losses) -> dict[str, float]:
    return {name.removeprefix("loss_fcos_"): loss.item() for name, loss in losses.items()}


def focal(positives: int, negatives: int) -> float:
    """Returns the sum of the focal loss at probability 1/2."""
    return (0.25 * positives + 0.75 * negatives) * 0.25 * LN2


def test_losses_are_divided_by_the_number_of_positive_points():
    losses = to_floats(make_loss()(predictions(middle=0.5), ONE_BOX, LEVELS))
    assert losses["cls"] == pytest.approx(focal(3, 3) / 3)
    assert losses["ctr"] == pytest.approx(3 * LN2 / 3)
    # Half of every distance is a quarter of the box.
    assert losses["loc"] == pytest.approx(0.75 * 1 / (1 + 2 * SIDE))


def test_moving_average_of_positives_has_momentum_0_9_and_is_saved():
    loss = make_loss(cls_normalizer="moving_fg", moving_fg_start=100.0)
    for average in (0.9 * 100 + 0.1 * 3, 0.9 * (0.9 * 100 + 0.1 * 3) + 0.1 * 3):
        losses = to_floats(loss(predictions(), ONE_BOX, LEVELS))
        assert losses["cls"] == pytest.approx(focal(3, 3) / average)
        assert losses["ctr"] == pytest.approx(LN2)  # the others use the count of this batch
        assert loss.moving_fg.item() == pytest.approx(average)
    loss(predictions(), NOTHING, LEVELS)  # counts as one
    assert loss.moving_fg.item() == pytest.approx(0.9 * average + 0.1)
    resumed = make_loss(cls_normalizer="moving_fg")
    resumed.load_state_dict(loss.state_dict())
    assert resumed.moving_fg == loss.moving_fg
    assert make_loss().state_dict() == {}


@pytest.mark.parametrize(
    "normalizer, divisor",
    [("all", 6), ("moving_fg", 0.9 * 100 + 0.1 * 3), ("fg", 3), ("fg_and_images", 3 + 2)],
)
def test_all_losses_can_share_a_normalizer(normalizer, divisor):
    truth = ground_truth([(WHOLE, 0)], [])
    loss = make_loss(cls_normalizer=normalizer, box_normalizer="cls", weight_by_centerness=False)
    losses = to_floats(loss(predictions(2, middle=0.5), truth, LEVELS))
    expected = {"cls": focal(3, 9) / divisor, "loc": 0.75 / divisor, "ctr": 3 * LN2 / divisor}
    assert losses == pytest.approx(expected)


def test_backward_works_after_the_moving_average_was_updated_again():
    loss, maps = make_loss(cls_normalizer="moving_fg"), predictions()
    first = loss(maps, ONE_BOX, LEVELS)
    loss(maps, ONE_BOX, LEVELS)
    sum(first.values()).backward()


def test_focal_loss_uses_weight_alpha_and_gamma():
    loss = make_loss(alpha=0.5, gamma=0.0, cls_weight=2.0)
    losses = to_floats(loss(predictions(), ONE_BOX, LEVELS))
    assert losses["cls"] == pytest.approx(2 * 6 * 0.5 * LN2 / 3)
    assert losses["ctr"] == pytest.approx(LN2)


def test_iou_quality_is_the_target_and_does_not_weight_the_box_loss():
    maps = predictions(middle=0.5)
    maps.quality[0].data.fill_(1.0)
    losses = to_floats(make_loss(box_quality="iou")(maps, ONE_BOX, LEVELS))
    assert set(losses) == {"cls", "loc", "iou"}
    assert losses["loc"] == pytest.approx(0.75 / 3)
    # Binary cross-entropy of logit 1: log(1 + e) minus the target, which is IoU 1, 1/4 and 1.
    assert losses["iou"] == pytest.approx((3 * math.log(1 + math.e) - 2.25) / 3)


@pytest.mark.parametrize("unit, iou", [(True, (0.75 + 1) / (3 + 1)), (False, 49 / 193)])
def test_smoothing_is_in_units_of_the_regression_targets(unit, iou):
    """The box has 3 squared strides or 192 square pixels, and the prediction a quarter of that."""
    loss = make_loss(iou_smooth=1.0, norm_reg_targets=unit, weight_by_centerness=False)
    losses = to_floats(loss(predictions(middle=0.5), ONE_BOX, LEVELS))
    assert losses["loc"] == pytest.approx((1 - iou) / 3)


@pytest.mark.parametrize("truth", [NOTHING, ground_truth([([4.0, 4.0, 4.0, 4.0], 0)])])
def test_batch_without_positives_only_has_a_classification_loss(truth):
    maps = predictions(middle=0.5)
    losses = make_loss()(maps, truth, LEVELS)
    assert to_floats(losses) == pytest.approx({"cls": focal(0, 6), "loc": 0, "ctr": 0})
    sum(losses.values()).backward()
    assert maps.ltrb[0].grad.abs().max() == 0 and maps.quality[0].grad.abs().max() == 0
    assert maps.logits[0].grad.min() > 0


def test_points_in_a_crowd_region_are_ignored_and_others_are_not():
    maps = predictions()
    truth = ground_truth([([0.0, 0.0, 16.0, 8.0], -1)])
    loss = make_loss()
    losses = loss(maps, truth, LEVELS)
    sum(losses.values()).backward()
    assert loss.assign(truth, LEVELS).labels.tolist() == [[-1, -1, 2]]
    assert maps.logits[0].grad[0, :, 0].ne(0).tolist() == [[False, False, True]] * 2
    assert to_floats(losses) == pytest.approx({"cls": focal(0, 2), "loc": 0, "ctr": 0})


def test_assignment_uses_the_pixel_extent():
    truth = ground_truth([([0.0, 0.0, 64.0, 9.0], 0), ([0.0, 0.0, 24.2, 24.2], 1)])
    labels = [make_loss(pixel_extent=e).assign(truth, LEVELS).labels[0, 0] for e in (0, 1)]
    assert labels == [0, 1]


def test_assignment_uses_the_center_radius_and_the_size_ranges():
    near = make_loss(center_radius=0.5).assign(ONE_BOX, LEVELS)
    assert near.labels.tolist() == [[2, 0, 2]]
    levels = PointGrid([8, 16]).levels(
        [torch.empty(1, 1, 1, 3), torch.empty(1, 1, 1, 2)], torch.empty(1, 3, 16, 32)
    )
    for inclusive, positives in ((True, [1, 1]), (False, [0, 1])):
        # Largest distances are 20, 12, 20 on the first level and 16 on the second.
        loss = make_loss(strides=[8, 16], sizes_of_interest=[12], range_inclusive=inclusive)
        truth = ground_truth([([0.0, 0.0, 24.0, 9.0], 0)])
        assert loss.assign(truth, levels).counts[0, :, 0].tolist() == positives


class OtherProcess:
    """Simulates a second process, whose totals all_reduce adds."""

    def __init__(self, monkeypatch, positives: float, centerness: float, points: float):
        self.calls = 0
        self.numbers = torch.tensor([positives, centerness, points])
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)

    def all_reduce(self, tensor, *_):
        self.calls += 1
        tensor.add_(self.numbers[: len(tensor)])


def test_normalizers_are_averaged_over_processes_in_one_all_reduce(monkeypatch):
    other = OtherProcess(monkeypatch, positives=7, centerness=2.0, points=9)
    losses = to_floats(make_loss()(predictions(middle=0.5), ONE_BOX, LEVELS))
    centerness = (1 + 2 * SIDE + 2) / 2
    expected = {"cls": focal(3, 3) / 5, "loc": 0.75 / centerness, "ctr": 3 * LN2 / 5}
    assert losses == pytest.approx(expected)
    assert other.calls == 1
    loss = make_loss(cls_normalizer="all")
    losses = to_floats(loss(predictions(), ONE_BOX, LEVELS))
    assert losses["cls"] == pytest.approx(focal(3, 3) / 6)
    assert other.calls == 2


def test_process_without_positives_participates_in_the_all_reduce(monkeypatch):
    other = OtherProcess(monkeypatch, positives=0, centerness=0, points=3)
    losses = to_floats(make_loss()(predictions(), NOTHING, LEVELS))
    assert other.calls == 1
    assert losses == pytest.approx({"cls": focal(0, 6), "loc": 0, "ctr": 0})


def test_normalizers_are_local_without_sync(monkeypatch):
    other = OtherProcess(monkeypatch, positives=7, centerness=2.0, points=9)
    losses = to_floats(make_loss(sync_normalizer=False)(predictions(), ONE_BOX, LEVELS))
    assert other.calls == 0
    assert losses["cls"] == pytest.approx(focal(3, 3) / 3)


def test_statistics_count_positives_ambiguous_points_and_boxes_without_points():
    loss = make_loss()
    assert loss.stats == {}
    around_the_middle, between_points = [8.0, 0.0, 16.0, 8.0], [5.0, 0.0, 11.0, 8.0]
    truth = ground_truth(
        [(WHOLE, 0), (around_the_middle, 1), (between_points, 1), ([4.5, 4, 4.6, 4.1], -1)],
        [([20.0, 4.0, 20.0, 4.0], 0)],
    )
    loss(predictions(2), truth, LEVELS)
    stats = {name: value.item() for name, value in loss.stats.items()}
    assert stats == {
        "fcos/positives_p3": 3 / 2,
        "fcos/ambiguous_points": 1 / 2,
        "fcos/boxes_without_points": 2 / 2,
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"box_quality": "center"}, "BOX_QUALITY must be one of 'ctrness', 'iou', got 'center'"),
        ({"cls_normalizer": "none"}, "LOSS_NORMALIZER_CLS must be one of 'fg', 'fg_and"),
        ({"box_normalizer": "all"}, "LOSS_NORMALIZER_BOX must be one of 'fg', 'cls', got 'all'"),
        ({"pixel_extent": 2}, "PIXEL_EXTENT must be one of 0, 1, got 2"),
        ({"loc_loss_type": "l1"}, "LOC_LOSS_TYPE must be one of 'iou', 'linear_iou', 'giou'"),
        (
            {"sizes_of_interest": [64]},
            "SIZES_OF_INTEREST.* must be 0 ascending bounds between 1 level",
        ),
        ({"strides": [8, 16, 32], "sizes_of_interest": [9, 4]}, "must be 2 ascending bounds"),
    ],
)
def test_invalid_option_is_rejected_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**options)


def test_class_out_of_range_is_an_error():
    with pytest.raises(RuntimeError, match=r"gt_classes must lie in \[-1, 2\)"):
        make_loss()(predictions(), ground_truth([(WHOLE, 2)]), LEVELS)
