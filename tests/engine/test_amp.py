"""Autocast in both precisions, loss scaling, and compiled models."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from fcos_d2.engine import Trainer
from fcos_d2.engine.hooks import build_ema
from fcos_d2.engine.step import StepTrainer, usable_precision
from fcos_d2.errors import InputError

from ..modeling.tiny import sample, tiny_cfg, tiny_fcos
from ..tiny_training import ROOT, metrics, python

pytest_plugins = ["tests.script"]

BFLOAT16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")
ACCURACY_TEST = "quick_schedules/fcos_R_18_FPN_digits_bfloat16_training_acc_test"
BATCH = [sample(64, 96, [[8.0, 8, 40, 48]]), sample(64, 96, [[20.0, 4, 60, 30]])]


def trainer_of(model: nn.Module, steps: int, **options) -> tuple[StepTrainer, list[float]]:
    """The trainer and its losses after some steps on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
    trainer, losses = StepTrainer(model, [BATCH] * steps, optimizer, **options), []
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            storage.iter = trainer.iter
            trainer.run_step()
            losses.append(storage.latest()["total_loss"][0])
    return trainer, losses


def losses_of(steps: int = 8, **options) -> tuple[StepTrainer, list[float]]:
    torch.manual_seed(3)
    return trainer_of(tiny_fcos(), steps, **options)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_both_precisions_learn_what_float32_does(precision):
    _, expected = losses_of()
    trainer, losses = losses_of(amp_dtype=precision)
    assert losses != expected, "autocast was off"
    assert losses == pytest.approx(expected, rel=0.03)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.grad_scaler.get_scale() == (65536 if precision == "float16" else 1)


def test_the_loss_scale_is_saved_and_comes_back():
    first, _ = losses_of(1, amp_dtype="float16")
    first.grad_scaler.update(512.0)
    with EventStorage():
        state = first.state_dict()
    assert state["grad_scaler"]["scale"] == 512
    second, _ = losses_of(1, amp_dtype="float16")
    second.load_state_dict(state)
    assert second.grad_scaler.get_scale() == 512


def test_an_overflow_halves_the_loss_scale_and_is_no_error():
    model = tiny_fcos()
    weight = model.head.cls_logits.weight
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.002)
    trainer = StepTrainer(model, [BATCH] * 2, optimizer, amp_dtype="float16")
    with EventStorage():
        trainer.grad_scaler.scale(torch.zeros(()))  # makes the scale, which is lazy
        trainer.grad_scaler.update(2.0**100)
        trainer.run_step()
        assert trainer.grad_scaler.get_scale() == 2.0**99 and torch.equal(weight, before)
        trainer.grad_scaler.update(0.5)  # a scale that overflows cannot be the reason any more
        weight.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(InputError, match="gradient of head.cls_logits.weight is not finite"):
            trainer.run_step()


def test_bfloat16_is_chosen_by_config_and_stays_on_without_a_gpu(script):
    result = script(*BFLOAT16, "DATASETS.TEST", "()")
    assert result.status == 0 and "AMP.ENABLED becomes" not in result.out
    with_amp = metrics(script.folder / "output")[-1]["total_loss"]
    assert script("DATASETS.TEST", "()", "OUTPUT_DIR", "other").status == 0
    without = metrics(script.folder / "other")[-1]["total_loss"]
    assert with_amp == pytest.approx(without, rel=0.05) and with_amp != without


@pytest.mark.slow
def test_bfloat16_loses_less_than_a_point_to_float32(tmp_path):
    """Two trainings of `make demo`'s length with the same seed.

    Measured, float32 and bfloat16: 65.9 and 65.6.
    """
    aps = []
    for schedule in ("digits/fcos_R_18_FPN_digits", ACCURACY_TEST):
        words = ("--config-file", ROOT / f"configs/{schedule}.yaml", "TEST.EVAL_PERIOD", 0)
        words += ("VIS_PERIOD", 0, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / schedule)
        done = python(ROOT / "train_net.py", *words, cwd=tmp_path, timeout=3600)
        assert done.returncode == 0, done.stderr
        aps.append(metrics(tmp_path / schedule)[-1]["bbox/AP"])
    assert aps[0] != aps[1], "autocast was off"
    assert aps[1] > aps[0] - 1


def test_float16_is_for_gpus(caplog):
    assert usable_precision("float16", "cuda") == "float16"
    assert usable_precision("bfloat16", "cpu") == "bfloat16"
    assert usable_precision("float16", "cpu") is None and "AMP is off" in caplog.text


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="float16, bfloat16, got 'fp8'; set SOLVER.AMP.PRECISION"):
        usable_precision("fp8", "cuda")


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile without its code generator: graphs are captured and run as they are."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    yield
    torch._dynamo.reset()


def assert_compiled_like(plain: nn.Module, compiled: nn.Module) -> None:
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    expected, found = plain(BATCH), compiled(BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    sum(found.values()).backward()
    assert compiled.head.cls_logits.weight.grad.isfinite().all()


def test_backbone_and_head_are_compiled_by_config(eager_compiler):
    plain, compiled = (Trainer.build_model(tiny_cfg("MODEL.COMPILE", c)) for c in (False, True))
    assert plain.backbone._compiled_call_impl is None is plain.head._compiled_call_impl
    assert compiled.backbone._compiled_call_impl and compiled.head._compiled_call_impl
    torch._dynamo.utils.counters.clear()
    assert_compiled_like(plain, compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
    average = build_ema(compiled, 0.9).module  # a copy, which must not compile as well
    assert list(average.state_dict()) == list(plain.state_dict())
    assert average.backbone._compiled_call_impl is None


@pytest.mark.slow
def test_compiled_code_computes_what_the_model_does():
    plain, compiled = (Trainer.build_model(tiny_cfg("MODEL.COMPILE", c)) for c in (False, True))
    assert_compiled_like(plain, compiled)
    torch._dynamo.reset()
