"""The parts of fcos_d2.engine that runs of train_net.py do not show by themselves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from fcos_d2 import add_fcos_config
from fcos_d2._compat import ResumableTrainer
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.engine import AssignmentStatistics, Trainer, TrainLoader
from fcos_d2.engine.hooks import EMAHook, build_ema
from fcos_d2.engine.loader import split_batch
from fcos_d2.engine.step import StepTrainer
from fcos_d2.errors import InputError
from fcos_d2.evaluation import THRESHOLD_FILE, evaluator_for
from fcos_d2.inference import evaluate

from ..tiny_training import write_shapes

pytest_plugins = ["tests.script"]


@pytest.fixture
def named_data():
    """Registers an empty data set with the given evaluator_type."""
    names = []

    def register(kind):
        name = f"engine_test_{kind}"
        DatasetCatalog.register(name, lambda: [])
        metadata = MetadataCatalog.get(name).set(thing_classes=["thing"], dirname="", year=2007)
        metadata.set(split="train", json_file=None, image_root="")
        names.append(name)
        if kind:
            metadata.set(evaluator_type=kind)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Fragile(nn.Module):
    """Two losses that are finite as long as its inputs are, and one whose gradient may not be."""

    def __init__(self):
        super().__init__()
        self.norm, self.root = nn.BatchNorm1d(3), nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        x = torch.stack([sample["x"] for sample in batch])
        root = (self.root * x.abs().sum()).sqrt() if x.any() else (0 * self.root).sqrt()
        return {"loss_a": self.norm(x).sum() + x.sum(), "loss_b": root}


def fragile_batch(value: float) -> list[dict]:
    return [
        {"x": torch.tensor([value, 0, 1.0 * (value != 0)]), "file_name": f"{n}.png"} for n in "ab"
    ]


def fragile_steps(values, **options) -> tuple[StepTrainer, EventStorage]:
    """A trainer after one step for each of ``values``."""
    model = Fragile()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer = StepTrainer(model, map(fragile_batch, values), optimizer, **options)
    with EventStorage() as storage:
        for trainer.iter in range(len(values)):
            storage.iter = trainer.iter
            trainer.run_step()
    return trainer, storage


def small_model():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_both_optimizers_honour_the_solver_keys(fcos_cfg, name):
    fcos_cfg.merge_from_list(
        ["SOLVER.OPTIMIZER", name, "SOLVER.BASE_LR", 0.5, "SOLVER.WEIGHT_DECAY", 0.25]
        + ["SOLVER.WEIGHT_DECAY_NORM", 0.125, "SOLVER.BIAS_LR_FACTOR", 2.0]
    )
    model = small_model()
    optimizer = Trainer.build_optimizer(fcos_cfg, model)
    assert isinstance(optimizer, {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}[name])
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert settings[id(model[0].weight)] == (0.5, 0.25)
    assert settings[id(model[0].bias)] == (1.0, 0.25)
    assert settings[id(model[1].weight)] == (0.5, 0.125)


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_gradients_are_clipped_for_both_optimizers(fcos_cfg, name):
    fcos_cfg.merge_from_list(["SOLVER.OPTIMIZER", name, "SOLVER.CLIP_GRADIENTS.ENABLED", True])
    fcos_cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = small_model()
    optimizer = Trainer.build_optimizer(fcos_cfg, model)
    (1000 * model(torch.ones(1, 3, 2, 2))).sum().backward()
    optimizer.step()
    assert max(p.grad.abs().max() for p in model.parameters()) == 0.5


@pytest.mark.parametrize(
    ("kind", "evaluator"),
    [("pascal_voc", "PascalVOCDetectionEvaluator"), ("lvis", "LVISEvaluator")],
)
def test_the_evaluator_follows_the_type_of_the_data_set(named_data, monkeypatch, kind, evaluator):
    made = []
    monkeypatch.setattr(
        f"fcos_d2.evaluation.evaluators.{evaluator}", lambda *a, **k: made.append(a)
    )
    name = named_data(kind)
    evaluator_for(name, "output")
    assert made == [(name,)]


@pytest.mark.parametrize("kind", ["cityscapes_instance", None])
def test_a_data_set_without_a_fitting_evaluator_is_refused(named_data, kind):
    with pytest.raises(InputError, match=f"evaluator_type {kind!r}.*coco, pascal_voc and lvis"):
        evaluator_for(named_data(kind), "output")


# ---- evaluation ----


def evaluate_shifted(evaluator, name: str) -> dict:
    """Results of detections a little beside the objects of a data set."""
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).float()
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((record["height"], record["width"]), pred_boxes=Boxes(boxes + 1))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.linspace(0.9, 0.8, len(boxes))
        evaluator.process([record], [{"instances": found}])
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
        return evaluate_shifted(make_evaluator(names[-1], str(tmp_path)), names[-1])

    yield evaluate_changed
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


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


def test_augmentation_of_another_model_is_refused_before_the_evaluation(fcos_cfg, monkeypatch):
    monkeypatch.setattr("fcos_d2.inference.build_detector", lambda cfg: small_model())
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


def test_thresholds_are_not_measured_on_lvis(named_data, fcos_cfg, monkeypatch):
    monkeypatch.setattr("fcos_d2.evaluation.evaluators.LVISEvaluator", lambda *a, **k: "LVIS")
    fcos_cfg.DATASETS.TEST = (named_data("lvis"),)
    assert Trainer.build_evaluator(fcos_cfg, fcos_cfg.DATASETS.TEST[0]) == "LVIS"


TWO_STAGES = """
_BASE_: tiny.yaml
MODEL:
  META_ARCHITECTURE: DETECTOR
  PROPOSAL_GENERATOR: {NAME: FCOSProposals}
  FCOS: {YIELD_PROPOSAL: True}
  ROI_HEADS: {NAME: StandardROIHeads, NUM_CLASSES: 2, IN_FEATURES: [p2, p3], SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 4}
VIS_PERIOD: 1
"""


@pytest.mark.parametrize(
    "architecture, measured", [("GeneralizedRCNN", "bbox"), ("ProposalNetwork", "box_proposals")]
)
def test_detectors_around_fcos_train_and_are_evaluated(script, architecture, measured):
    (script.folder / "two.yaml").write_text(TWO_STAGES.replace("DETECTOR", architecture))
    assert script(config="two.yaml").status == 0
    result = script("--eval-only", "MODEL.WEIGHTS", "output/model_final.pth", config="two.yaml")
    assert result.status == 0 and measured in result.results[0]


def test_a_config_that_nobody_resolved_trains(script):
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file("tiny.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.FCOS.CONVENTION = "cpu", "torchvision"
    trainer = Trainer(cfg)
    assert trainer.model.grid.offset == 0


# ---- statistics, checkpoints ----


def test_statistics_are_read_from_the_device_only_when_due():
    reads = []

    class Losses:
        @property
        def stats(self):
            reads.append(trainer.iter)
            return {"fcos/positives_p3": torch.tensor(7), "fcos/unserved_boxes": torch.tensor(0.5)}

    with EventStorage() as storage:
        model = SimpleNamespace(losses=Losses())
        trainer = SimpleNamespace(model=model, storage=storage, iter=0, max_iter=10)
        hook = AssignmentStatistics(period=4)
        hook.trainer = trainer
        for trainer.iter in range(10):
            storage.iter = trainer.iter
            hook.after_step()
    assert reads == [3, 7, 9]
    assert storage.latest() == {"fcos/positives_p3": (7, 9), "fcos/unserved_boxes": (0.5, 9)}


def test_statistics_do_not_mind_other_models():
    hook = AssignmentStatistics(period=1)
    hook.trainer = SimpleNamespace(model=small_model(), iter=0, max_iter=10)
    hook.after_step()


class StatefulTrainer(ResumableTrainer):
    """A ResumableTrainer without a config: what it saves is all that matters."""

    def __init__(self):
        super(DefaultTrainer, self).__init__()
        model = small_model()
        self._trainer = SimpleNamespace(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        self._trainer.state_dict = lambda: {"optimizer": self.optimizer.state_dict()}
        self._trainer.load_state_dict = lambda s: self.optimizer.load_state_dict(s["optimizer"])


@pytest.fixture(params=["0.6", "main"])
def detectron2_version(request, monkeypatch):
    """DefaultTrainer as it is in 0.6, and with the state that main saves."""

    def state_dict(self):
        return super(DefaultTrainer, self).state_dict() | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state):
        super(DefaultTrainer, self).load_state_dict(state)
        self._trainer.load_state_dict(state["_trainer"])

    methods = {"state_dict": state_dict, "load_state_dict": load_state_dict}
    for name, method in methods.items():
        if request.param == "main":
            monkeypatch.setattr(DefaultTrainer, name, method, raising=False)
        elif name in vars(DefaultTrainer):
            monkeypatch.delattr(DefaultTrainer, name)


def test_the_optimizer_survives_a_checkpoint_of_every_detectron2(detectron2_version):
    first, second = StatefulTrainer(), StatefulTrainer()
    first.iter, first.optimizer.param_groups[0]["lr"] = 5, 0.75
    state = first.state_dict()
    assert set(state["_trainer"]) == {"optimizer"}  # what main reads
    second.load_state_dict(state)
    assert second.iter == 5 and second.optimizer.param_groups[0]["lr"] == 0.75


def test_a_checkpoint_without_optimizer_resumes_with_a_warning(detectron2_version, caplog):
    trainer = StatefulTrainer()
    trainer.load_state_dict({"iteration": 3})
    assert trainer.iter == 3 and "momenta start from zero" in caplog.text


def test_an_error_lists_five_tensors_and_counts_the_others(tmp_path):
    def layers(width):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    torch.save(layers(2).state_dict(), tmp_path / "small.pth")
    with pytest.raises(InputError) as caught:
        Checkpointer(layers(3)).load(str(tmp_path / "small.pth"))
    assert str(caught.value).count("expected") == 5
    assert "0.weight expected (3, 3), got (2, 2)" in str(caught.value)
    assert "and 3 more" in str(caught.value)


# ---- numbers that are not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_itself_iteration_and_images(value):
    with pytest.raises(InputError) as caught:
        fragile_steps([1.0, 2.0, value])
    message = str(caught.value)
    assert message.startswith("iteration 2: loss_a is nan")
    assert "for images a.png, b.png; look at these images" in message
    assert "SOLVER.BASE_LR" in message and "SOLVER.MAX_SKIPPED_ITERS" in message


def test_a_gradient_that_is_not_finite_names_its_parameters():
    with pytest.raises(InputError, match="iteration 1: gradient of root is not finite for images"):
        fragile_steps([1.0, 0.0])


def test_some_iterations_may_be_skipped_and_leave_nothing_behind(caplog):
    trainer, storage = fragile_steps([1.0, float("nan"), 0.0, 1.0], max_skipped=2)
    expected, _ = fragile_steps([1.0, 1.0])
    ours, theirs = trainer.model.state_dict(), expected.model.state_dict()
    for name in ("root", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        assert torch.equal(ours[name], theirs[name]), name
    assert [record.message[:30] for record in caplog.records] == [
        "iteration 1: loss_a is nan, lo", "iteration 2: gradient of root "
    ]  # fmt: skip
    assert "skipped, 2 of 2" in caplog.text
    assert storage.latest()["skipped_iterations"] == (2, 2)
    assert len(storage.history("loss_a").values()) == 2
    with EventStorage():
        assert trainer.state_dict()["skipped"] == 2


def test_one_skipped_iteration_too_many_ends_the_training():
    with pytest.raises(InputError, match="iteration 2: .*, after 1 skipped ones"):
        fragile_steps([float("nan"), 1.0, float("nan")], max_skipped=1)


# ---- accumulation, averages ----


def test_accumulated_gradients_are_those_of_the_mean():
    values = [1.0, 2.0, 3.0]
    model = Fragile()
    trainer = StepTrainer(
        model, map(fragile_batch, values), torch.optim.SGD(model.parameters(), 0.01), accumulation=3
    )
    with EventStorage() as storage:
        trainer.run_step()
    alone = Fragile()
    losses = [sum(alone(fragile_batch(value)).values()) for value in values]
    (sum(losses) / 3).backward()
    assert storage.latest()["total_loss"][0] == pytest.approx((sum(losses) / 3).item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("images", "accumulation"), [(6, 4), (6, 0), (0, 1)])
def test_images_that_cannot_be_divided_are_refused(images, accumulation):
    with pytest.raises(InputError, match=f"{images} images .*GRADIENT_ACCUMULATION"):
        split_batch(images, accumulation)


def test_average_follows_the_weights_and_statistics(tmp_path):
    model = Fragile()
    averaged = build_ema(model, 0.75)
    hook = EMAHook(averaged, Checkpointer(model, str(tmp_path)))
    hook.trainer = SimpleNamespace(model=model, iter=0, max_iter=3, flush=lambda: True)
    expected = None
    for hook.trainer.iter in range(3):
        for tensor in (model.root.data, model.norm.running_mean):
            tensor += 1
        new = torch.cat((model.root.detach().view(1), model.norm.running_mean))
        expected = new.clone() if expected is None else 0.75 * expected + 0.25 * new
        assert (tmp_path / "model_final_ema.pth").exists() is False
        hook.after_step()
    saved = torch.load(tmp_path / "model_final_ema.pth")["model"]
    found = torch.cat((saved["root"].view(1), saved["norm.running_mean"]))
    torch.testing.assert_close(found, expected)
    assert not any(p.requires_grad for p in averaged.parameters())
    assert not (tmp_path / "last_checkpoint").exists()  # nothing to resume from


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(InputError, match="MODEL_EMA.DECAY must be in"):
        build_ema(small_model(), decay)


def test_the_average_is_evaluated_saved_and_found_again(script, monkeypatch):
    evaluated = []

    def test(cfg, model, evaluators=None):
        evaluated.append({key: value.clone() for key, value in model.state_dict().items()})
        return {}

    monkeypatch.setattr(Trainer, "test", staticmethod(test))
    monkeypatch.setattr("fcos_d2.inference.test", test)
    ema = ("MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.5)
    assert script(*ema, "SOLVER.MAX_ITER", 3).status == 0
    output = script.folder / "output"
    last, average = (torch.load(output / f"model_final{x}.pth")["model"] for x in ("", "_ema"))
    assert not torch.equal(last["head.cls_logits.bias"], average["head.cls_logits.bias"])
    weights = ("--eval-only", "MODEL.WEIGHTS")
    assert script(*weights, "output/model_final_ema.pth").status == 0
    assert script(*weights, "output/model_final.pth", *ema).status == 0
    assert script(*weights, "output/model_final.pth").status == 0
    torch.testing.assert_close(evaluated, [dict(average)] * 3 + [dict(last)], rtol=0, atol=0)


def test_precise_statistics_are_those_of_the_average(script):
    ema = ("MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.999)
    precise = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3)
    period = ("TEST.EVAL_PERIOD", 2)
    name = "backbone.bottom_up.stem.conv1.norm.running_var"
    found = []
    for options in (ema, (*ema, *precise)):
        assert script(*options, *period).status == 0
        found.append(torch.load(script.folder / "output" / "model_final_ema.pth")["model"][name])
    assert (found[1] > 3 * found[0]).all()  # which are mostly the initial ones


def test_a_period_without_checkpoints_is_refused(script):
    result = script("SOLVER.CHECKPOINT_PERIOD", 0)
    assert result.status == 2 and "CHECKPOINT_PERIOD must be at least 1, got 0" in result.err


def test_data_without_a_length_is_refused():
    with pytest.raises(InputError, match="type map, which has no length; register a list"):
        TrainLoader(map(dict, []), mapper=dict, total_batch_size=1)
