"""Tests matching and AP by hand and against detectron2's evaluator."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from fcos_d2.evaluation.matching import Objects, evaluate_boxes, ground_truth, match_boxes
from tests.catalogs import coco_content


def objects(boxes, classes, scores=None, crowd=None) -> Objects:
    scores, crowd = (part if part is None else np.array(part) for part in (scores, crowd))
    return Objects(np.array(boxes, float).reshape(-1, 4), np.array(classes, int), scores, crowd)


A, B, FAR = [0, 0, 20, 20], [40, 40, 80, 90], [100, 100, 120, 120]


def test_object_matches_only_the_detection_with_the_best_score():
    truth = objects([A, B], [0, 1])
    found = objects([A, A, B, FAR], [0, 0, 1, 0], [0.6, 0.9, 0.8, 0.7])
    evaluation = evaluate_boxes([truth], [found], 2)
    (image,) = evaluation.images
    assert image.matched.tolist() == [-1, 0, 1, -1]
    assert not image.ignored.any() and not image.missed.any()
    curve = evaluation.curves[0]
    assert curve.scores.tolist() == [0.9, 0.7, 0.6]
    assert curve.correct.tolist() == [True, False, False] and curve.num_objects == 1
    assert evaluation.average() == pytest.approx(100)


def test_indices_are_those_within_the_image():
    truth = [objects([], []), objects([FAR, A], [1, 1]), objects([B], [0])]
    found = [objects([A], [0], [0.5]), objects([A], [1], [0.9]), objects([], [], [])]
    images = evaluate_boxes(truth, found, 2).images
    assert [image.matched.tolist() for image in images] == [[-1], [1], []]
    assert [image.missed.tolist() for image in images] == [[], [True, False], [True]]


def test_detections_in_a_crowd_are_ignored_and_a_crowd_is_never_missed():
    truth = objects([A, B], [0, 0], crowd=[False, True])
    found = objects([A, [42, 42, 60, 60], FAR], [0, 0, 0], [0.9, 0.8, 0.7])
    evaluation = evaluate_boxes([truth], [found], 1)
    assert evaluation.images[0].ignored.tolist() == [False, True, False]
    assert evaluation.curves[0].correct.tolist() == [True, False]
    assert not evaluate_boxes([truth], [objects([], [], [])], 1).images[0].missed[1]


def test_ap_of_a_class_without_objects_is_nan():
    evaluation = evaluate_boxes([objects([A], [0])], [objects([A], [1], [0.9])], 3)
    assert evaluation.average(class_=0) == 0
    assert math.isnan(evaluation.average(class_=2))
    assert evaluation.average() == 0


@pytest.mark.parametrize("function", [evaluate_boxes, match_boxes])
def test_different_numbers_of_images_are_refused(function):
    with pytest.raises(ValueError, match="the same number of images, got 1 and 0"):
        function([objects([A], [0])], [], 1)


def test_ground_truth_converts_boxes_and_crowds():
    annotations = [
        {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 1},
        {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0},
    ]
    truth = ground_truth({"annotations": annotations})
    assert truth.boxes.tolist() == [[1, 2, 4, 6], [1, 2, 3, 4]]
    assert truth.classes.tolist() == [2, 0] and truth.crowd.tolist() == [True, False]
    assert ground_truth({}).boxes.shape == (0, 4)


@pytest.fixture
def random_data(tmp_path):
    """Registers twelve images of random objects; returns their records and random detections."""
    rng = np.random.default_rng(0)
    truth, found = {}, []
    for number in range(12):
        corners = rng.uniform(0, 150, (rng.integers(0, 6), 2))
        sizes = rng.uniform(8, 120, corners.shape)
        boxes = np.concatenate([corners, corners + sizes], 1)
        classes = rng.integers(0, 3, len(boxes))
        crowd = (rng.random(len(boxes)) < 0.1).astype(int).tolist()
        rows = zip((classes + 1).tolist(), np.concatenate([corners, sizes], 1), crowd, strict=True)
        truth[str(number)] = list(rows)
        moved = np.repeat(boxes, 3, 0) + rng.normal(0, 6, (3 * len(boxes), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
        classes = np.where(rng.random(len(moved)) < 0.8, np.repeat(classes, 3), 0)
        found.append(objects(moved, classes.tolist(), rng.random(len(moved)).tolist()))
    (tmp_path / "r.json").write_text(json.dumps(coco_content(truth, "abc", (300, 300))))
    register_coco_instances("random_boxes", {}, str(tmp_path / "r.json"), str(tmp_path))
    return DatasetCatalog.get("random_boxes"), found


def test_match_boxes_returns_the_matches_of_the_evaluation(random_data):
    records, found = random_data
    truth = [ground_truth(record) for record in records]
    matches, evaluation = match_boxes(truth, found, 3), evaluate_boxes(truth, found, 3)
    np.testing.assert_equal(matches, (evaluation.images, evaluation.curves))


def test_ap_matches_detectron2(random_data, tmp_path):
    records, found = random_data
    ours = evaluate_boxes([ground_truth(record) for record in records], found, 3)
    theirs = COCOEvaluator("random_boxes", ("bbox",), output_dir=str(tmp_path), use_fast_impl=False)
    theirs.reset()
    for record, (boxes, classes, scores, _) in zip(records, found, strict=True):
        instances = Instances((300, 300), pred_boxes=Boxes(torch.tensor(boxes)))
        instances.scores, instances.pred_classes = torch.tensor(scores), torch.tensor(classes)
        theirs.process([record], [{"instances": instances}])
    expected = theirs.evaluate()["bbox"]
    averages = {"AP": {}, "AP50": {"iou": 0}, "AP75": {"iou": 5}}
    averages |= {"APs": {"size": 1}, "APm": {"size": 2}, "APl": {"size": 3}, "AP-b": {"class_": 1}}
    for name, options in averages.items():
        assert ours.average(**options) == pytest.approx(expected[name], abs=1e-6), name


def test_average_of_all_counts_more_than_100_detections():
    """All of 300 objects are detected, but COCO's AP counts only the best 100 of a class."""
    corners = np.stack(np.meshgrid(np.arange(20), np.arange(15)), axis=-1).reshape(-1, 2) * 10.0
    boxes = np.concatenate((corners, corners + 8), axis=1)
    truth = [objects(boxes, [0] * 300)]
    found = [objects(boxes, [0] * 300, np.linspace(0.9, 0.1, 300))]
    evaluation = evaluate_boxes(truth, found, 1)
    assert evaluation.average() == pytest.approx(100 / 3, abs=1)
    assert evaluation.average_of_all() == pytest.approx(100) and evaluation.max_detections == 300
    assert evaluation.curves[0].correct.sum() == 300 and not evaluation.images[0].missed.any()
    assert match_boxes(truth, found, 1).curves[0].correct.sum() == 300
