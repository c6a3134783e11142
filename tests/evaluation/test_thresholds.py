"""Tests score thresholds and their file."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given
from hypothesis import strategies as st

from fcos_d2.errors import InputError
from fcos_d2.evaluation.matching import Curve
from fcos_d2.evaluation.thresholds import (
    THRESHOLD_FILE,
    Threshold,
    ThresholdEvaluator,
    best_threshold,
    f1_score,
    read_thresholds,
    write_thresholds,
)


def curve(scores, correct, num_objects) -> Curve:
    return Curve(np.array(scores, float), np.array(correct, bool), num_objects)


def test_best_threshold_by_hand():
    # F1 after 1, 2, 3, 4 detections: 2/4, 4/5, 4/6, 6/7 of 3 objects.
    found = best_threshold(curve([0.9, 0.7, 0.6, 0.3], [1, 1, 0, 1], 3))
    assert found.score == 0.3 and found.f1 == pytest.approx(6 / 7)
    assert found.precision == pytest.approx(3 / 4) and found.recall == 1
    # The higher of two thresholds with equal F1 is chosen.
    assert best_threshold(curve([0.9, 0.6, 0.5, 0.4, 0.2], [1, 0, 0, 0, 1], 3)).score == 0.9


def test_equal_scores_are_kept_or_dropped_together():
    # F1 would be 1 if only the first detection with score 0.6 were kept.
    found = best_threshold(curve([0.9, 0.6, 0.6], [1, 1, 0], 2))
    assert found.score == 0.6 and found.f1 == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    "case", [curve([], [], 0), curve([], [], 4), curve([0.9], [0], 0), curve([0.9], [0], 2)]
)
def test_class_without_objects_or_matches_has_the_default(case):
    assert best_threshold(case) == Threshold(0.5, 0.0, 0.0, 0.0)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.7]), st.booleans()), max_size=12),
    st.integers(0, 3),
)
def test_no_other_threshold_is_better(detections, missed):
    detections = sorted(detections, key=lambda d: -d[0])
    hits = sum(correct for _, correct in detections)
    case = curve([d[0] for d in detections], [d[1] for d in detections], hits + missed)
    best = best_threshold(case)
    reached = [f1_score([case], [score]) for score in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert f1_score([case], [best.score]) == pytest.approx(max(reached) if hits else 0.0)
    assert best.f1 == pytest.approx(max(reached))


def test_thresholds_per_class_improve_f1():
    high = curve([0.95, 0.9, 0.8, 0.7], [1, 1, 0, 0], 2)  # two false positives above 0.5
    low = curve([0.4, 0.35, 0.3, 0.1], [1, 1, 1, 0], 3)  # no detections above 0.5
    best = [best_threshold(high), best_threshold(low)]
    assert [t.score for t in best] == [0.9, 0.3]
    assert f1_score([high, low], [t.score for t in best]) == 1
    assert f1_score([high, low], [0.5, 0.5]) == pytest.approx((2 * 2 / 6 + 0) / 2)


def test_f1_ignores_classes_without_objects():
    assert f1_score([curve([0.9], [1], 1), curve([0.9], [0], 0)], [0.5, 0.5]) == 1
    assert f1_score([], []) == 0


def test_file_round_trip_preserves_names_and_scores(tmp_path):
    path = tmp_path / "new" / THRESHOLD_FILE
    write_thresholds(path, ["a", "b"], [Threshold(0.25, 1, 1, 1), Threshold(1 / 3, 0, 0, 0)], "x")
    assert read_thresholds(path) == (["a", "b"], [0.25, 1 / 3])
    assert json.loads(path.read_text())["measured_on"] == "x"
    path.write_text("{}")
    with pytest.raises(InputError, match="evaluate the model again"):
        read_thresholds(path)


def test_evaluator_measures_and_writes_thresholds(coco, tmp_path):
    """Three images have a box each; that of the second has a low score, that of the third none."""
    name = coco.register()
    evaluator = ThresholdEvaluator(name, str(tmp_path / "out"))
    evaluator.reset()
    box, nothing = [[5.0, 6, 25, 16]], torch.zeros(0, 4)
    outputs = [
        (torch.tensor(box), [0.9], [1]),
        (torch.tensor(box), [0.3], [0]),
        (nothing, [], []),
    ]
    for number, (boxes, scores, classes) in enumerate(outputs, 1):
        found = Instances((40, 60), pred_boxes=Boxes(boxes), scores=torch.tensor(scores))
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        evaluator.process([{"image_id": number}], [{"instances": found}])
    results = evaluator.evaluate()["best_f1"]
    # Class 0 has the box of image 2; class 1 those of images 1 and 3.
    assert results["F1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert results["F1_at_0.5"] == pytest.approx(100 * (0 + 2 / 3) / 2)
    names, scores = read_thresholds(tmp_path / "out" / THRESHOLD_FILE)
    assert names == ["disc", "box"] and scores == pytest.approx([0.3, 0.9])


def test_thresholds_need_detections_and_annotations(coco, tmp_path):
    evaluator = ThresholdEvaluator(coco.register(), str(tmp_path))
    evaluator.process([{"image_id": 1}], [{"proposals": Instances((40, 60))}])
    assert evaluator.evaluate() == {}
    del coco.content["annotations"]
    evaluator = ThresholdEvaluator(coco.register("unlabeled"), str(tmp_path))
    assert evaluator.evaluate() == {} and not (tmp_path / THRESHOLD_FILE).exists()


def test_evaluator_reports_the_ap_of_more_than_100_detections(coco, tmp_path):
    evaluator = ThresholdEvaluator(coco.register(), str(tmp_path))
    evaluator.reset()
    boxes = torch.tensor([[5.0, 6, 25, 16]]).repeat(120, 1)
    found = Instances((40, 60), pred_boxes=Boxes(boxes), scores=torch.linspace(0.9, 0.1, 120))
    found.pred_classes = torch.ones(120, dtype=torch.int64)
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert evaluator.evaluate()["bbox_of_120"]["AP"] == pytest.approx(100)
