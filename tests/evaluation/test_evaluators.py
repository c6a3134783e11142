"""Tests the selection of evaluators and the completion of annotations."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from torch import nn

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.records import is_flat, xyxy_boxes
from fcos_d2.engine import Trainer
from fcos_d2.errors import InputError
from fcos_d2.evaluation import THRESHOLD_FILE, ThresholdEvaluator, evaluator_for
from fcos_d2.inference import evaluate

from ..tiny_training import write_shapes

pytest_plugins = ["tests.script"]


def register_empty(kind) -> str:
    """Registers an empty dataset with the given evaluator_type; returns its name."""
    name = f"engine_test_{kind}"
    DatasetCatalog.register(name, lambda: [])
    metadata = MetadataCatalog.get(name).set(thing_classes=["thing"], dirname="", year=2007)
    metadata.set(split="train", json_file=None, image_root="")
    if kind:
        metadata.set(evaluator_type=kind)
    return name


@pytest.mark.parametrize(
    "kind, evaluator",
    [("pascal_voc", "PascalVOCDetectionEvaluator"), ("lvis", "LVISEvaluator")],
)
def test_evaluator_type_selects_the_evaluator(monkeypatch, kind, evaluator):
    monkeypatch.setattr(f"fcos_d2.evaluation.evaluators.{evaluator}", lambda name, **_: name)
    name = register_empty(kind)
    assert evaluator_for(name, "output") == name


@pytest.mark.parametrize("kind", ["cityscapes_instance", None])
def test_unsupported_evaluator_type_is_refused(kind):
    with pytest.raises(InputError, match=f"must be coco, pascal_voc or lvis, got {kind!r}"):
        evaluator_for(register_empty(kind), "output")


# ---- Evaluation ----


def detections(name: str, shift: float = 0.0) -> list[tuple]:
    """Returns inputs and outputs of a model that detects all objects, shifted by ``shift``."""
    found = []
    for record in load_dataset(name, filter_empty=False):
        annotations = [a for a in record["annotations"] if not is_flat(a)]
        boxes = torch.tensor(xyxy_boxes(annotations)).float() + shift
        instances = Instances((record["height"], record["width"]), pred_boxes=Boxes(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
        instances.scores = torch.linspace(0.9, 0.8, len(boxes))
        found.append(([record], [{"instances": instances}]))
    return found


def results_of(evaluator, found) -> dict:
    evaluator.reset()
    for inputs, outputs in found:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


@pytest.fixture
def evaluation_of(tmp_path):
    """Returns a function that changes all annotations of the tiny shapes and evaluates them."""
    names = []

    def evaluate_changed(change, make_evaluator=evaluator_for):
        content = json.loads(write_shapes(tmp_path).read_text())
        for annotation in content["annotations"]:
            change(annotation)
        (tmp_path / "changed.json").write_text(json.dumps(content))
        names.append(f"changed_{len(names)}")
        register_coco_instances(names[-1], {}, str(tmp_path / "changed.json"), str(tmp_path))
        evaluator = make_evaluator(names[-1], str(tmp_path))
        return results_of(evaluator, detections(names[-1], shift=1.0))

    return evaluate_changed


def like_official_files(annotation):
    """Sets areas of masks, crowds and arbitrary ids."""
    number = annotation["id"]
    annotation.update(id=900_000 - number, area=0.6 * annotation["area"], iscrowd=int(number == 3))


def test_results_match_detectron2_for_complete_files(evaluation_of):
    def make_detectron2(name, folder):
        return COCOEvaluator(name, ("bbox",), output_dir=folder, use_fast_impl=False)

    expected = evaluation_of(like_official_files, make_detectron2)
    assert 0 < expected["bbox"]["AP"] < 100
    np.testing.assert_equal(evaluation_of(like_official_files), expected)


def changed(**fields):
    """Returns a function that sets fields of an annotation; ``...`` removes a field."""

    def change(annotation):
        annotation.update(fields)
        for key in [key for key, value in fields.items() if value is ...]:
            del annotation[key]

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(area=...),
        changed(area=None),
        changed(area="12"),
        changed(area=float("nan")),
        changed(iscrowd=...),
        changed(iscrowd=None),
        changed(iscrowd=False),
        lambda annotation: annotation.update(id=annotation["id"] - 1),  # from 0
        lambda annotation: annotation.update(id=f"no. {annotation['id']}"),
    ],
)
def test_missing_and_invalid_fields_are_completed(evaluation_of, change):
    np.testing.assert_equal(evaluation_of(change), evaluation_of(changed()))


def average_precision(name: str, found) -> float:
    return results_of(evaluator_for(name), found)["bbox"]["AP"]


def test_boxes_without_area_are_ignored(tmp_path, caplog):
    content = json.loads(write_shapes(tmp_path).read_text())
    content["annotations"][0]["bbox"][2] = 0
    (tmp_path / "flat.json").write_text(json.dumps(content))
    register_coco_instances("flat", {}, str(tmp_path / "flat.json"), str(tmp_path))
    found = detections("flat")
    assert average_precision("flat", found) == pytest.approx(100)
    assert "the evaluation ignores 1 boxes without area" in caplog.text
    thresholds = ThresholdEvaluator("flat", str(tmp_path))
    assert results_of(thresholds, found)["best_f1"]["F1"] == pytest.approx(100)


def test_annotations_of_data_registered_in_python_are_not_cached(tmp_path):
    path = write_shapes(tmp_path)
    register_coco_instances("as_file", {}, str(path), str(tmp_path))
    records = load_dataset("as_file")
    wrong = deepcopy(records)
    for record in wrong:
        for annotation in record["annotations"]:
            annotation["bbox"] = [0, 0, 2, 2]
    versions = [wrong, records]
    DatasetCatalog.register("in_python", lambda: versions[0])
    metadata = MetadataCatalog.get("in_python")
    metadata.set(thing_classes=class_names("as_file"), evaluator_type="coco")
    found = detections("as_file")
    assert average_precision("in_python", found) < 1
    versions.pop(0)
    assert average_precision("in_python", found) == pytest.approx(100)
    assert not metadata.get("json_file")


def test_tta_of_another_model_is_refused_before_evaluation(fcos_cfg, monkeypatch):
    monkeypatch.setattr("fcos_d2.inference.build_detector", lambda cfg: nn.Linear(1, 1))
    monkeypatch.setattr("fcos_d2.inference.test", None)
    fcos_cfg.TEST.AUG.ENABLED = True
    with pytest.raises(InputError, match="TEST.AUG.ENABLED needs MODEL.META_ARCHITECTURE FCOS"):
        evaluate(fcos_cfg)


def test_thresholds_are_saved_next_to_the_evaluated_weights(script, tmp_path):
    assert script().status == 0
    (tmp_path / "shared").mkdir()
    (tmp_path / "output" / "model_final.pth").rename(tmp_path / "shared" / "w.pth")
    before = (tmp_path / "output" / THRESHOLD_FILE).read_text()
    (tmp_path / "output" / THRESHOLD_FILE).write_text("unchanged")
    assert script("--eval-only", "MODEL.WEIGHTS", "shared/w.pth").status == 0
    assert (tmp_path / "output" / THRESHOLD_FILE).read_text() == "unchanged"
    assert (tmp_path / "shared" / THRESHOLD_FILE).read_text() == before
    assert script("--eval-only").status == 0  # without weights
    assert (tmp_path / "output" / THRESHOLD_FILE).read_text() != "unchanged"


def test_thresholds_are_not_measured_on_lvis(fcos_cfg, monkeypatch):
    monkeypatch.setattr("fcos_d2.evaluation.evaluators.LVISEvaluator", lambda *a, **k: "LVIS")
    fcos_cfg.DATASETS.TEST = (register_empty("lvis"),)
    assert Trainer.build_evaluator(fcos_cfg, fcos_cfg.DATASETS.TEST[0]) == "LVIS"
