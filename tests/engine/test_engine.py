"""Tests optimizers, hooks, EMA, and training of other detectors."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from fcos_d2 import add_fcos_config
from fcos_d2._compat import ResumableTrainer
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.engine import AssignmentStatistics, Trainer
from fcos_d2.engine.hooks import EMAHook, build_ema
from fcos_d2.engine.step import StepTrainer
from fcos_d2.errors import InputError

pytest_plugins = ["tests.script"]


def small_model():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("name, kind", [("SGD", torch.optim.SGD), ("ADAMW", torch.optim.AdamW)])
def test_optimizers_use_the_solver_keys(fcos_cfg, name, kind):
    options = {"OPTIMIZER": name, "BASE_LR": 0.5, "WEIGHT_DECAY": 0.25, "BIAS_LR_FACTOR": 2.0}
    options |= {"WEIGHT_DECAY_NORM": 0.125, "MOMENTUM": 0.75, "NESTEROV": True}
    options |= {"CLIP_GRADIENTS.ENABLED": True, "CLIP_GRADIENTS.CLIP_VALUE": 0.5}
    fcos_cfg.merge_from_list([x for k, v in options.items() for x in (f"SOLVER.{k}", v)])
    model = small_model()
    optimizer = Trainer.build_optimizer(fcos_cfg, model)
    assert isinstance(optimizer, kind)
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert settings[id(model[0].weight)] == (0.5, 0.25)
    assert settings[id(model[0].bias)] == (1.0, 0.25)
    assert settings[id(model[1].weight)] == (0.5, 0.125)
    if name == "SGD":
        assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.75, True)}
    (1000 * model(torch.ones(1, 3, 2, 2))).sum().backward()
    optimizer.step()
    assert max(p.grad.abs().max() for p in model.parameters()) == 0.5


def test_optimizers_are_fused_on_gpus(fcos_cfg):
    """Fused optimizers skip non-finite steps on the GPU; see test_step.py."""
    for device, fused in (("cuda", True), ("cpu", None)):
        fcos_cfg.MODEL.DEVICE = device
        assert Trainer.build_optimizer(fcos_cfg, small_model()).defaults["fused"] is fused


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
def test_detectors_that_use_fcos_proposals_train_and_evaluate(script, architecture, measured):
    (script.folder / "two.yaml").write_text(TWO_STAGES.replace("DETECTOR", architecture))
    assert script(config="two.yaml").status == 0
    result = script("--eval-only", "MODEL.WEIGHTS", "output/model_final.pth", config="two.yaml")
    assert result.status == 0 and measured in result.results[0]


def test_trainer_resolves_the_convention(script):
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file("tiny.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.FCOS.CONVENTION = "cpu", "torchvision"
    trainer = Trainer(cfg)
    assert trainer.model.grid.offset == 0


# ---- statistics ----


def test_statistics_are_read_from_the_device_only_when_due():
    reads = []

    class Losses:
        @property
        def stats(self):
            reads.append(trainer.iter)
            counts = {"fcos/positives_p3": 7, "fcos/boxes_without_points": 0.5}
            return {name: torch.tensor(count) for name, count in counts.items()}

    with EventStorage() as storage:
        model = SimpleNamespace(losses=Losses())
        trainer = SimpleNamespace(model=model, storage=storage, iter=0, max_iter=10)
        hook = AssignmentStatistics(period=4)
        hook.trainer = trainer
        for trainer.iter in range(10):
            storage.iter = trainer.iter
            hook.after_step()
        trainer.model, trainer.iter = small_model(), 3  # other models have none
        hook.after_step()
    assert reads == [3, 7, 9]
    assert storage.latest() == {"fcos/positives_p3": (7, 9), "fcos/boxes_without_points": (0.5, 9)}


# ---- detectron2 0.6 and main ----


class StatefulTrainer(ResumableTrainer):
    """A ResumableTrainer without a config, to save and load its state."""

    def __init__(self):
        super(DefaultTrainer, self).__init__()
        model = small_model()
        self._trainer = SimpleNamespace(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        self._trainer.state_dict = lambda: {"optimizer": self.optimizer.state_dict()}
        self._trainer.load_state_dict = lambda s: self.optimizer.load_state_dict(s["optimizer"])


@pytest.fixture(params=["0.6", "main"])
def detectron2_version(request, monkeypatch):
    """Replaces DefaultTrainer's methods that save and load the state by those of a version."""

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


def test_optimizer_state_is_saved_and_restored_with_every_detectron2(detectron2_version, caplog):
    first, second = StatefulTrainer(), StatefulTrainer()
    first.iter, first.optimizer.param_groups[0]["lr"] = 5, 0.75
    state = first.state_dict()
    assert set(state["_trainer"]) == {"optimizer"}  # the state that main reads
    second.load_state_dict(state)
    assert second.iter == 5 and second.optimizer.param_groups[0]["lr"] == 0.75
    second.load_state_dict({"iteration": 3})
    assert second.iter == 3 and "momenta start from zero" in caplog.text


# ---- EMA, precise batch norm ----


def test_ema_follows_the_weights_and_statistics(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = build_ema(model, 0.75)
    hook = EMAHook(ema, Checkpointer(model, str(tmp_path)))
    hook.trainer = SimpleNamespace(model=model, iter=0, max_iter=3, flush=lambda: True)
    expected = None
    for hook.trainer.iter in range(3):
        for tensor in (model[0].bias.data, model[1].running_mean):
            tensor += 1
        model[1].num_batches_tracked += 1
        new = torch.cat((model[0].bias.detach(), model[1].running_mean))
        expected = new.clone() if expected is None else 0.75 * expected + 0.25 * new
        assert (tmp_path / "model_final_ema.pth").exists() is False
        hook.after_step()
    saved = torch.load(tmp_path / "model_final_ema.pth")["model"]
    torch.testing.assert_close(torch.cat((saved["0.bias"], saved["1.running_mean"])), expected)
    assert not any(p.requires_grad for p in ema.parameters())
    assert not (tmp_path / "last_checkpoint").exists()  # nothing to resume from


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_invalid_decay_is_rejected(decay):
    with pytest.raises(InputError, match="MODEL_EMA.DECAY must be in"):
        build_ema(small_model(), decay)


def test_ema_is_evaluated_saved_and_loaded(script, monkeypatch):
    evaluated = []

    def test(cfg, model, evaluators=None):
        evaluated.append(model.head.cls_logits.bias.detach().clone())
        return {}

    monkeypatch.setattr(Trainer, "test", staticmethod(test))
    monkeypatch.setattr("fcos_d2.inference.test", test)
    ema = ("MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.5)
    assert script(*ema, "SOLVER.MAX_ITER", 3).status == 0
    last, average = (
        torch.load(script.folder / f"output/model_final{name}.pth")["model"]
        for name in ("", "_ema")
    )
    last, average = (weights["head.cls_logits.bias"] for weights in (last, average))
    assert not torch.equal(last, average)
    weights = ("--eval-only", "MODEL.WEIGHTS")
    assert script(*weights, "output/model_final_ema.pth").status == 0
    assert script(*weights, "output/model_final.pth", *ema).status == 0
    assert script(*weights, "output/model_final.pth").status == 0
    torch.testing.assert_close(evaluated, [average] * 3 + [last], rtol=0, atol=0)


def test_precise_bn_updates_the_statistics_of_the_ema(script):
    ema = ("MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.999)
    precise = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3)
    name = "backbone.bottom_up.stem.conv1.norm.running_var"
    found = []
    for options in (ema, (*ema, *precise)):
        assert script(*options, "TEST.EVAL_PERIOD", 2).status == 0
        found.append(torch.load(script.folder / "output" / "model_final_ema.pth")["model"][name])
    assert (found[1] > 3 * found[0]).all()  # found[0] is mostly the initial value


# ---- batch norm ----


@pytest.mark.parametrize("norm, size", [("BN", 6), ("BN", 7), ("GN", 6)])
def test_batch_norm_of_one_value_is_rejected_before_training(script, norm, size):
    """Images of 48 x 64 become 6 x 8 (or 7 x 9), which are padded to 8 x 8 (or 8 x 16)."""
    options = ("INPUT.MIN_SIZE_TRAIN", f"({size}, 40)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 9)
    options += ("MODEL.FCOS.NORM", norm, "MODEL.RESNETS.NORM", "FrozenBN")
    options += ("MODEL.FPN.OUT_CHANNELS", 64)
    result = script(*options, "SOLVER.IMS_PER_BATCH", 1)
    if (norm, size) != ("BN", 6):
        assert result.status == 0
        return
    assert result.status == 2 and "Starting training" not in result.out
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    for part in ("feature map of 1x1", "SOLVER.IMS_PER_BATCH", "MIN_SIZE_TRAIN", "FCOS", "NORM"):
        assert part in line


def test_batch_norm_of_one_value_during_training_is_a_one_line_error():
    """LazyConfigs and cropped images are not checked before training."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    trainer = StepTrainer(model, [torch.ones(1, 3)], torch.optim.SGD(model.parameters(), 0.1))
    with EventStorage(), pytest.raises(InputError, match="feature map of 1x1; raise SOLVER.IMS"):
        trainer.run_step()
