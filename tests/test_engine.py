"""The parts of fcos_d2.engine that runs of train_net.py do not show by themselves."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from fcos_d2 import add_fcos_config
from fcos_d2._compat import ResumableTrainer
from fcos_d2.engine import AssignmentStatistics, Checkpointer, Trainer, evaluator_for, run_script
from fcos_d2.engine.trainer import training_errors
from fcos_d2.errors import InputError


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_fcos_config(cfg)
    return cfg


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


def small_model():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_both_optimizers_honour_the_solver_keys(cfg, name):
    cfg.merge_from_list(
        ["SOLVER.OPTIMIZER", name, "SOLVER.BASE_LR", 0.5, "SOLVER.WEIGHT_DECAY", 0.25]
        + ["SOLVER.WEIGHT_DECAY_NORM", 0.125, "SOLVER.BIAS_LR_FACTOR", 2.0]
    )
    model = small_model()
    optimizer = Trainer.build_optimizer(cfg, model)
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
def test_gradients_are_clipped_for_both_optimizers(cfg, name):
    cfg.merge_from_list(["SOLVER.OPTIMIZER", name, "SOLVER.CLIP_GRADIENTS.ENABLED", True])
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = small_model()
    optimizer = Trainer.build_optimizer(cfg, model)
    (1000 * model(torch.ones(1, 3, 2, 2))).sum().backward()
    optimizer.step()
    assert max(p.grad.abs().max() for p in model.parameters()) == 0.5


@pytest.mark.parametrize(
    ("kind", "evaluator"),
    [("pascal_voc", "PascalVOCDetectionEvaluator"), ("lvis", "LVISEvaluator")],
)
def test_the_evaluator_follows_the_type_of_the_data_set(named_data, monkeypatch, kind, evaluator):
    made = []
    monkeypatch.setattr(f"fcos_d2.engine.trainer.{evaluator}", lambda *a, **k: made.append(a))
    name = named_data(kind)
    evaluator_for(name, "output")
    assert made == [(name,)]


@pytest.mark.parametrize("kind", ["cityscapes_instance", None])
def test_a_data_set_without_a_fitting_evaluator_is_refused(named_data, kind):
    with pytest.raises(InputError, match=f"evaluator_type {kind!r}.*coco, pascal_voc and lvis"):
        evaluator_for(named_data(kind), "output")


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


def test_a_checkpoint_that_needs_unpickling_is_refused_in_one_line(tmp_path):
    torch.save({"model": {}, "args": SimpleNamespace(a=1)}, tmp_path / "pickled.pth")
    with pytest.raises(InputError, match="pickled.pth is no checkpoint that can be read") as caught:
        Checkpointer(small_model()).load(str(tmp_path / "pickled.pth"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_loss_report_with_numpy_2_numbers_is_readable():
    with pytest.raises(InputError) as caught, training_errors():
        raise FloatingPointError(
            "Loss became infinite or NaN at iteration=7!\n"
            "loss_dict = {'loss_fcos_cls': np.float64(nan), 'loss_fcos_loc': np.float64(0.5)}"
        )
    assert str(caught.value).startswith(
        "Loss became infinite or NaN at iteration=7! "
        "loss_dict = {'loss_fcos_cls': nan, 'loss_fcos_loc': 0.5}; try a lower SOLVER.BASE_LR"
    )


def test_an_input_error_of_a_spawned_process_is_one_line(monkeypatch, capsys):
    def spawn(*args, **kwargs):
        text = (
            "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call "
            "last):\n  File 'x.py', line 1\nfcos_d2.errors.InputError: no such data; do that\n"
        )
        raise torch.multiprocessing.ProcessRaisedException(text, 1, 4242)

    monkeypatch.setattr("fcos_d2.engine.script.launch", spawn)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = SimpleNamespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    assert run_script(lambda args: None, args) == 2
    assert capsys.readouterr().err == "error: no such data; do that\n"
