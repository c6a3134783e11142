"""PostProcessor and to_instances: every option on two points whose scores are known."""

import pytest
import torch

from fcos_d2.modeling import PointGrid, PostProcessor, Predictions, to_instances

from .tiny import tiny_cfg

# One image of 8 x 16 pixels with the points (4, 4) and (12, 4), and two classes.
LEVELS = PointGrid([8]).levels([torch.empty(1, 1, 1, 2)], torch.empty(1, 3, 8, 16))
SIZES = torch.tensor([[8, 16]])


def predictions(probability, quality, ltrb) -> Predictions:
    """``probability`` [class][point], ``quality`` [point], ``ltrb`` [point], of one image."""
    return Predictions(
        [torch.tensor(probability).logit().view(1, 2, 1, 2)],
        [torch.tensor(ltrb, dtype=torch.float32).T.reshape(1, 4, 1, 2)],
        [torch.tensor(quality).logit().view(1, 1, 1, 2)],
        [],
    )


# Both points say the box [0, 0, 16, 8], the second one also two pixels beyond the right side.
SAME_BOX = [[0.5, 0.5, 1.5, 0.5], [1.5, 0.5, 0.75, 0.5]]
TWO_POINTS = predictions([[0.9, 0.3], [0.0, 0.6]], [0.4, 0.8], SAME_BOX)


def detect(maps=TWO_POINTS, sizes=SIZES, **options):
    """(boxes, scores rounded, classes) of the first image."""
    settings = {"nms_threshold": 1.0, "score_threshold": 0.05} | options
    detections = PostProcessor(**settings)(maps, LEVELS, sizes)
    (found,) = to_instances(detections, sizes.tolist())
    scores = [round(score, 3) for score in found.scores.tolist()]
    return found.pred_boxes.tensor.tolist(), scores, found.pred_classes.tolist()


def test_boxes_are_decoded_and_sorted_by_the_root_of_probability_times_quality():
    boxes, scores, classes = detect()
    assert scores == [round(x**0.5, 3) for x in (0.6 * 0.8, 0.9 * 0.4, 0.3 * 0.8)]
    assert classes == [1, 0, 0]
    assert boxes == [[0, 0, 18, 8], [0, 0, 16, 8], [0, 0, 18, 8]]


def test_detections_take_no_part_in_gradients():
    maps = Predictions(
        *([level.clone().requires_grad_() for level in m] for m in TWO_POINTS[:3]), []
    )
    detections = PostProcessor()(maps, LEVELS, SIZES)
    assert not detections.boxes.requires_grad and not detections.scores.requires_grad


@pytest.mark.parametrize(
    "rule, expected", [("product", [0.48, 0.36, 0.24]), ("cls", [0.9, 0.6, 0.3])]
)
def test_score_rules(rule, expected):
    assert detect(score_rule=rule)[1] == expected


def test_threshold_is_on_the_probability_or_on_its_product_with_the_quality():
    assert len(detect(score_threshold=0.5)[1]) == 2
    assert len(detect(score_threshold=0.4, threshold_with_quality=True)[1]) == 1


def test_best_candidates_are_those_of_the_highest_product_or_probability():
    assert detect(topk=1)[2] == [1]
    assert detect(topk=1, rank_with_quality=False)[2] == [0]


def test_boxes_are_clipped_to_the_image_on_request():
    assert detect(clip=True)[0][0] == [0, 0, 16, 8]


def test_each_image_is_clipped_to_its_own_size():
    maps = Predictions(*([level.repeat(2, 1, 1, 1) for level in m] for m in TWO_POINTS[:3]), [])
    sizes = torch.tensor([[8, 16], [5, 9]])
    boxes = PostProcessor(clip=True)(maps, LEVELS, sizes).boxes
    assert boxes[:, 0].tolist() == [[0, 0, 16, 8], [0, 0, 9, 5]]


def test_overlapping_boxes_of_one_class_lose_to_the_best():
    assert detect(nms_threshold=0.5)[2] == [1, 0]
    assert detect(nms_threshold=0.9)[2] == [1, 0, 0]  # they overlap by 16 / 18


def test_boxes_of_all_classes_can_suppress_each_other():
    assert detect(nms_threshold=0.5, class_agnostic=True)[2] == [1]


def test_soft_nms_lowers_scores_instead():
    _, scores, classes = detect(nms_threshold=0.5, nms_method="linear")
    assert classes == [1, 0, 0]
    assert scores[2] == pytest.approx(0.24**0.5 * (1 - 16 / 18), abs=1e-3)
    wide, narrow = (detect(nms_method="gaussian", nms_sigma=s)[1][2] for s in (2.0, 0.5))
    assert narrow < wide < 0.24**0.5


def test_at_most_so_many_detections():
    assert detect(max_detections=2)[2] == [1, 0]


def test_nothing_found_is_an_empty_list_of_boxes():
    maps = predictions([[0.01, 0.01]] * 2, [0.5, 0.5], SAME_BOX)
    (found,) = to_instances(PostProcessor()(maps, LEVELS, SIZES), [(8, 16)])
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)
    assert found.image_size == (8, 16)


def test_instances_of_each_image_are_its_own():
    empty = predictions([[0.01, 0.01]] * 2, [0.5, 0.5], SAME_BOX)
    pairs = zip(empty[:3], TWO_POINTS[:3], strict=True)
    maps = Predictions(*([torch.cat((a[0], b[0]))] for a, b in pairs), [])
    sizes = [(8, 16), (7, 15)]
    detections = PostProcessor(nms_threshold=1.0)(maps, LEVELS, torch.tensor(sizes))
    found = to_instances(detections, sizes)
    assert [len(image) for image in found] == [0, 3]
    assert [image.image_size for image in found] == sizes
    assert found[1].pred_classes.dtype == torch.int64


def test_proposals_of_training_have_their_own_limits():
    cfg = tiny_cfg(
        INFERENCE_TH_TRAIN=0.1, PRE_NMS_TOPK_TRAIN=11, POST_NMS_TOPK_TRAIN=12,
        INFERENCE_TH_TEST=0.2, PRE_NMS_TOPK_TEST=21, POST_NMS_TOPK_TEST=22,
    )  # fmt: skip
    limits = [
        (p.selection["score_threshold"], p.selection["topk"], p.suppression["max_detections"])
        for p in (PostProcessor(cfg, split="TRAIN"), PostProcessor(cfg))
    ]
    assert limits == [(0.1, 11, 12), (0.2, 21, 22)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score_rule": "srqt"}, "SCORE_RULE must be one of 'sqrt', 'product', 'cls', got 'srqt'"),
        ({"nms_method": "soft"}, "NMS_METHOD must be one of 'hard', 'linear', 'gaussian'"),
        ({"score_threshold": 5.0}, r"INFERENCE_TH_\* must be in \[0, 1\], got 5.0"),
        ({"nms_threshold": 60}, r"NMS_TH must be in \[0, 1\], got 60"),
        ({"topk": 0}, r"PRE_NMS_TOPK_\* must be in \[1, inf\], got 0"),
        ({"max_detections": 0}, r"POST_NMS_TOPK_\* must be in \[1, inf\], got 0"),
    ],
)
def test_option_that_cannot_be_is_refused_before_training_starts(options, message):
    with pytest.raises(ValueError, match=f"FCOS: MODEL.FCOS.{message}"):
        PostProcessor(**options)
