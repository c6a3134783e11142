"""Which evaluator a dataset gets, and what it completes in files that lack something."""

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
from fcos_d2.data.records import boxes_of, is_flat
from fcos_d2.engine import Trainer
from fcos_d2.errors import InputError
from fcos_d2.evaluation import THRESHOLD_FILE, ThresholdEvaluator, evaluator_for
from fcos_d2.inference import evaluate

from ..tiny_training import write_shapes

pytest_plugins = ["tests.script"]


def named_data(kind) -> str:
    """Registers an empty dataset with the given evaluator_type."""
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
def test_the_evaluator_follows_the_type_of_the_data_set(monkeypatch, kind, evaluator):
    monkeypatch.setattr(f"fcos_d2.evaluation.evaluators.{evaluator}", lambda name, **_: name)
    name = named_data(kind)
    assert evaluator_for(name, "output") == name


@pytest.mark.parametrize("kind", ["cityscapes_instance", None])
def test_a_data_set_without_a_fitting_evaluator_is_refused(kind):
    with pytest.raises(InputError, match=f"evaluator_type {kind!r}.*coco, pascal_voc and lvis"):
        evaluator_for(named_data(kind), "output")


# ---- evaluation ----


def detections(name: str, shift: float = 0.0) -> list[tuple]:
    """Every object, found a little beside it, as inputs and outputs of a model."""
    found = []
    for record in load_dataset(name, filter_empty=False):
        annotations = [a for a in record["annotations"] if not is_flat(a)]
        boxes = torch.tensor(boxes_of(annotations)).float() + shift
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
    """Registers the tiny shapes after a change of every annotation and evaluates them."""
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


def as_published(annotation):
    """What official files hold: areas of masks, crowds, ids from anywhere."""
    number = annotation["id"]
    annotation.update(id=900_000 - number, area=0.6 * annotation["area"], iscrowd=int(number == 3))


def test_results_of_complete_files_are_those_of_detectron2(evaluation_of):
    def detectron2s(name, folder):
        return COCOEvaluator(name, ("bbox",), output_dir=folder, use_fast_impl=False)

    expected = evaluation_of(as_published, detectron2s)
    assert 0 < expected["bbox"]["AP"] < 100
    np.testing.assert_equal(evaluation_of(as_published), expected)


def changed(**fields):
    """A change of an annotation; ``...`` removes a field."""

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
def test_what_a_file_lacks_for_its_evaluation_is_completed(evaluation_of, change):
    np.testing.assert_equal(evaluation_of(change), evaluation_of(changed()))


def average_precision(name: str, found) -> float:
    return results_of(evaluator_for(name), found)["bbox"]["AP"]


def test_boxes_of_no_area_are_not_evaluated(tmp_path, caplog):
    content = json.loads(write_shapes(tmp_path).read_text())
    content["annotations"][0]["bbox"][2] = 0
    (tmp_path / "flat.json").write_text(json.dumps(content))
    register_coco_instances("flat", {}, str(tmp_path / "flat.json"), str(tmp_path))
    found = detections("flat")
    assert average_precision("flat", found) == pytest.approx(100)
    assert "1 boxes without area are left out of the evaluation" in caplog.text
    thresholds = ThresholdEvaluator("flat", str(tmp_path))
    assert results_of(thresholds, found)["best_f1"]["F1"] == pytest.approx(100)


def test_corrected_data_registered_in_python_is_evaluated_as_it_is_now(tmp_path):
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


def test_augmentation_of_another_model_is_refused_before_the_evaluation(fcos_cfg, monkeypatch):
    monkeypatch.setattr("fcos_d2.inference.build_detector", lambda cfg: nn.Linear(1, 1))
    monkeypatch.setattr("fcos_d2.inference.test", None)
    fcos_cfg.TEST.AUG.ENABLED = True
    with pytest.raises(InputError, match="TEST.AUG.ENABLED needs MODEL.META_ARCHITECTURE FCOS"):
        evaluate(fcos_cfg)


def test_thresholds_lie_beside_the_weights_that_were_evaluated(script, tmp_path):
    assert script().status == 0
    (tmp_path / "shared").mkdir()
    (tmp_path / "output" / "model_final.pth").rename(tmp_path / "shared" / "w.pth")
    before = (tmp_path / "output" / THRESHOLD_FILE).read_text()
    (tmp_path / "output" / THRESHOLD_FILE).write_text("of the training")
    assert script("--eval-only", "MODEL.WEIGHTS", "shared/w.pth").status == 0
    assert (tmp_path / "output" / THRESHOLD_FILE).read_text() == "of the training"
    assert (tmp_path / "shared" / THRESHOLD_FILE).read_text() == before
    assert script("--eval-only").status == 0  # weights from nowhere
    assert (tmp_path / "output" / THRESHOLD_FILE).read_text() != "of the training"


def test_thresholds_are_not_measured_on_lvis(fcos_cfg, monkeypatch):
    monkeypatch.setattr("fcos_d2.evaluation.evaluators.LVISEvaluator", lambda *a, **k: "LVIS")
    fcos_cfg.DATASETS.TEST = (named_data("lvis"),)
    assert Trainer.build_evaluator(fcos_cfg, fcos_cfg.DATASETS.TEST[0]) == "LVIS"
