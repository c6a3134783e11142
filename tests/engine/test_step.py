"""Tests StepTrainer: non-finite losses, accumulation, mixed precision, compilation, its state."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from fcos_d2.engine import Trainer, step
from fcos_d2.engine.hooks import build_ema
from fcos_d2.engine.step import StepTrainer, amp_dtype
from fcos_d2.errors import InputError

from ..modeling.test_no_host_sync import NoHostSync
from ..modeling.tiny import sample, tiny_cfg, tiny_fcos
from ..tiny_training import ROOT, metrics, python

pytest_plugins = ["tests.script"]

NAN, INF = float("nan"), float("inf")
BATCH = [sample(64, 96, [[8.0, 8, 40, 48]]), sample(64, 96, [[20.0, 4, 60, 30]])]
BFLOAT16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")
ACCURACY_TEST = "quick_schedules/fcos_R_18_FPN_digits_bfloat16_training_acc_test"


class Fragile(nn.Module):
    """Has two losses that are finite for finite inputs; the gradient of one may not be."""

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


def run(trainer: StepTrainer, steps: int) -> tuple[StepTrainer, EventStorage, list[float]]:
    """Runs some steps; returns the trainer, its storage, and the total loss after each step."""
    losses = []
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            storage.iter = trainer.iter
            trainer.run_step()
            losses.append(storage.latest().get("total_loss", (None,))[0])
    return trainer, storage, losses


def make_fragile(values, is_deferred: bool = False, **options) -> StepTrainer:
    """Builds a trainer that reads ``values``; ``is_deferred`` makes it check late, as on a GPU."""
    model = Fragile()
    fused = {"momentum": 0.9, "fused": True} if is_deferred else {"momentum": 0.9}
    optimizer = torch.optim.SGD(model.parameters(), 0.01, **fused)
    trainer = StepTrainer(model, map(fragile_batch, values), optimizer, **options)
    trainer._is_deferred = is_deferred
    return trainer


def run_fragile(values, **options) -> tuple[StepTrainer, EventStorage]:
    return run(make_fragile(values, **options), len(values))[:2]


def assert_same_state(ours: StepTrainer, theirs: StepTrainer) -> None:
    ours, theirs = ours.model.state_dict(), theirs.model.state_dict()
    for name in ("root", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def detector_steps(steps: int = 8, **options) -> tuple[StepTrainer, list[float]]:
    torch.manual_seed(3)
    model = tiny_fcos()
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
    trainer, _, losses = run(StepTrainer(model, [BATCH] * steps, optimizer, **options), steps)
    return trainer, losses


# ---- non-finite losses and gradients ----


@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_loss_is_reported_with_iteration_and_images(value):
    with pytest.raises(InputError) as caught:
        run_fragile([1.0, 2.0, value])
    message = str(caught.value)
    assert message.startswith("iteration 2: loss_a is nan")
    assert "for images a.png, b.png; look at these images" in message
    assert "SOLVER.BASE_LR" in message and "SOLVER.MAX_SKIPPED_ITERS" in message


def test_nonfinite_gradients_are_reported_with_the_images():
    message = "iteration 1: gradients are not finite for images a.png, b.png; look at"
    with pytest.raises(InputError, match=message):
        run_fragile([1.0, 0.0])


@pytest.mark.parametrize("is_deferred", [False, True])
def test_skipped_iterations_do_not_change_the_state(caplog, is_deferred):
    values = [1.0, NAN, 0.0, 1.0]
    trainer, storage = run_fragile(values, max_skipped=2, is_deferred=is_deferred)
    assert_same_state(trainer, run_fragile([1.0, 1.0], is_deferred=is_deferred)[0])
    assert [record.message[:30] for record in caplog.records] == [
        "iteration 1: loss_a is nan, lo", "iteration 2: gradients are not"
    ]  # fmt: skip
    assert "skipped, 2 of 2" in caplog.text
    with storage:
        trainer.flush()
        assert trainer.state_dict()["skipped"] == 2
    assert storage.latest()["skipped_iterations"] == (2, 2)
    assert [iteration for _, iteration in storage.history("loss_a").values()] == [0, 3]


def test_too_many_skipped_iterations_end_training():
    with pytest.raises(InputError, match="iteration 2: .*, after skipping 1"):
        run_fragile([NAN, 1.0, NAN], max_skipped=1)


class Constant(nn.Module):
    """Has a non-finite loss whose gradient is finite."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss": self.weight + NAN}


def test_nonfinite_loss_with_finite_gradients_skips_the_step():
    model = Constant()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True, momentum=0.9)
    trainer = StepTrainer(model, [[{}]] * 3, optimizer, max_skipped=9)
    trainer._is_deferred = True
    optimizer.state[model.weight]["momentum_buffer"] = torch.zeros(())
    run(trainer, 3)
    assert model.weight.item() == 1


# ---- deferred checks ----


def test_deferred_check_ends_training_in_the_next_iteration_without_the_step():
    trainer = make_fragile([1.0, NAN, 1.0], is_deferred=True)
    with pytest.raises(InputError, match="iteration 1: loss_a is nan"):
        run(trainer, 3)
    assert torch.equal(trainer.model.root, run_fragile([1.0], is_deferred=True)[0].model.root)


def test_deferred_check_runs_before_a_checkpoint():
    trainer, storage, losses = run(make_fragile([1.0, 2.0, NAN], is_deferred=True), 3)
    assert losses[1] == losses[0] != losses[2]  # iteration 1 is logged in iteration 2
    with storage, pytest.raises(InputError, match="iteration 2: loss_a is nan"):
        trainer.gather_rng_states()  # as before every checkpoint and evaluation


def test_the_first_step_of_a_fused_optimizer_is_not_deferred():
    """SGD allocates uninitialized momenta, which a skipped step does not write."""
    trainer = make_fragile([NAN], is_deferred=True, max_skipped=1)
    run(trainer, 1)
    assert trainer._skipped == 1 and not trainer.optimizer.state


class Smooth(Fragile):
    """Needs no value on the host; see test_no_host_sync.py for FCOS."""

    def forward(self, batch):
        x = torch.stack([sample["x"] for sample in batch])
        return {"loss_a": self.norm(x).sum(), "loss_b": (self.root * x).mean()}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{"max_skipped": 1}, {"amp_dtype": torch.float16}])
def test_iteration_does_not_synchronize_with_the_device(optimizer, options):
    model = Smooth()
    optimizer = optimizer(model.parameters(), 0.01, fused=True)
    trainer, storage, _ = run(StepTrainer(model, [fragile_batch(1.0)] * 2, optimizer, **options), 1)
    trainer._is_deferred, trainer.flush = True, lambda: True  # which reads values
    optimizer.state.setdefault(model.root, {})  # plain SGD has none
    before = model.root.item()
    with storage, NoHostSync():
        trainer.run_step()
    assert model.root.item() != before


@pytest.mark.cuda
def test_step_does_not_synchronize_with_cuda():
    model = tiny_fcos("MODEL.DEVICE", "cuda")
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9, fused=True)
    trainer, storage, _ = run(StepTrainer(model, [BATCH] * 9, optimizer), 4)
    batches = trainer._to_device([BATCH])  # waits for these copies, on a stream of their own
    trainer._to_device = lambda _: batches
    torch.cuda.set_sync_debug_mode("error")
    try:
        with storage:
            trainer.run_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- accumulation ----


def test_accumulated_gradients_are_gradients_of_the_mean_loss():
    values = [1.0, 2.0, 3.0]
    trainer, _, (total,) = run(make_fragile(values, accumulation=3), 1)
    alone = Fragile()
    loss = sum(sum(alone(fragile_batch(value)).values()) for value in values) / 3
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(trainer.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---- mixed precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_losses_approximate_float32(dtype):
    _, expected = detector_steps()
    trainer, losses = detector_steps(amp_dtype=dtype)
    assert losses != expected, "autocast was off"
    assert losses == pytest.approx(expected, rel=0.03)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.grad_scaler.get_scale() == (65536 if dtype is torch.float16 else 1)


def test_loss_scale_is_saved_and_restored():
    first, second = (detector_steps(1, amp_dtype=torch.float16)[0] for _ in range(2))
    first.grad_scaler.update(512.0)
    with EventStorage():
        state = first.state_dict()
    second.load_state_dict(state)
    assert second.grad_scaler.get_scale() == 512
    third = detector_steps(1)[0]
    third.load_state_dict(state)
    assert third.grad_scaler.get_scale() == 1


def test_overflow_halves_the_loss_scale_before_it_is_an_error():
    model = tiny_fcos()
    weight = model.head.cls_logits.weight
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.002)
    trainer = StepTrainer(model, [BATCH] * 2, optimizer, amp_dtype=torch.float16)
    with EventStorage():
        trainer.grad_scaler.scale(torch.zeros(()))  # initializes the scale lazily
        trainer.grad_scaler.update(2.0**100)
        trainer.run_step()
        assert trainer.grad_scaler.get_scale() == 2.0**99 and torch.equal(weight, before)
        trainer.grad_scaler.update(0.5)  # too small to be the cause
        weight.register_hook(lambda gradient: gradient * INF)
        with pytest.raises(InputError, match="gradients are not finite"):
            trainer.run_step()


def test_bfloat16_can_be_enabled_without_a_gpu(script):
    result = script(*BFLOAT16, "DATASETS.TEST", "()")
    assert result.status == 0 and "AMP.ENABLED becomes" not in result.out
    with_amp = metrics(script.folder / "output")[-1]["total_loss"]
    assert script("DATASETS.TEST", "()", "OUTPUT_DIR", "other").status == 0
    without = metrics(script.folder / "other")[-1]["total_loss"]
    assert with_amp == pytest.approx(without, rel=0.05) and with_amp != without


@pytest.mark.slow
def test_bfloat16_loses_less_than_one_ap_to_float32(tmp_path):
    """Two runs of `make demo`'s length with the same seed. Measured: 65.9 (float32) and 65.6."""
    aps = []
    for schedule in ("digits/fcos_R_18_FPN_digits", ACCURACY_TEST):
        words = ("--config-file", ROOT / f"configs/{schedule}.yaml", "TEST.EVAL_PERIOD", 0)
        words += ("VIS_PERIOD", 0, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / schedule)
        words += ("SOLVER.AMP.ENABLED", schedule == ACCURACY_TEST)  # else "auto" decides
        done = python(ROOT / "train_net.py", *words, cwd=tmp_path, timeout=3600)
        assert done.returncode == 0, done.stderr
        aps.append(metrics(tmp_path / schedule)[-1]["bbox/AP"])
    assert aps[0] != aps[1], "autocast was off"
    assert aps[1] > aps[0] - 1


@pytest.mark.parametrize("fastest, dtype", [(torch.bfloat16,) * 2, (torch.float32, None)])
def test_auto_is_the_fastest_dtype_of_the_device(fastest, dtype, monkeypatch):
    monkeypatch.setattr(step, "fastest_dtype", lambda device: fastest)
    assert amp_dtype("auto", "cpu") is dtype


def test_float16_needs_a_gpu(caplog):
    assert amp_dtype("float16", "cuda") is torch.float16
    assert amp_dtype("bfloat16", "cpu") is torch.bfloat16
    assert amp_dtype("float16", "cpu") is None and "AMP is off" in caplog.text
    with pytest.raises(InputError, match="SOLVER.AMP.PRECISION must be one of .*, got 'fp8'"):
        amp_dtype("fp8", "cuda")


def test_float64_and_bfloat16_weights_train_and_float16_is_rejected():
    for dtype in (torch.float64, torch.bfloat16):
        model = Smooth().to(dtype)
        data = [[{"x": image["x"].to(dtype)} for image in fragile_batch(1.0)]] * 2
        run(StepTrainer(model, data, torch.optim.SGD(model.parameters(), 0.1)), 2)
        assert model.root.dtype is dtype and model.root != 1
    with pytest.raises(InputError, match="float16 weights .*; train float32 .* SOLVER.AMP"):
        StepTrainer(model.half(), data, torch.optim.SGD(model.parameters(), 0.1))


# ---- torch.compile ----


@pytest.fixture
def eager_compiler(monkeypatch):
    """Replaces torch.compile's backend: graphs are captured, but run eagerly."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, mode: compile_module(self, backend="eager")
    )
    yield
    torch._dynamo.reset()


def assert_compiled_like(plain: nn.Module, compiled: nn.Module) -> None:
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    expected, found = plain(BATCH), compiled(BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    sum(found.values()).backward()
    assert compiled.head.cls_logits.weight.grad.isfinite().all()


def test_config_can_compile_backbone_and_head(eager_compiler):
    plain, compiled = (Trainer.build_model(tiny_cfg("MODEL.COMPILE", c)) for c in (False, True))
    assert plain.backbone._compiled_call_impl is None is plain.head._compiled_call_impl
    assert compiled.backbone._compiled_call_impl and compiled.head._compiled_call_impl
    torch._dynamo.utils.counters.clear()
    assert_compiled_like(plain, compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
    ema = build_ema(compiled, 0.9).module  # a copy, which is not compiled
    assert list(ema.state_dict()) == list(plain.state_dict())
    assert ema.backbone._compiled_call_impl is None


def test_unknown_compile_mode_is_an_error():
    cfg = tiny_cfg("MODEL.COMPILE", True, "MODEL.COMPILE_MODE", "fast")
    with pytest.raises(InputError, match="MODEL.COMPILE_MODE: Unrecognized mode=fast, should be"):
        Trainer.build_model(cfg)


@pytest.mark.slow
def test_compiled_model_matches_the_original():
    plain, compiled = (Trainer.build_model(tiny_cfg("MODEL.COMPILE", c)) for c in (False, True))
    assert_compiled_like(plain, compiled)
    torch._dynamo.reset()
