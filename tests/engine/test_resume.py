"""Resumed training matches uninterrupted training after SIGKILL, SIGTERM and full disks."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.saving import atomic_write
from fcos_d2.engine import Trainer
from fcos_d2.engine.hooks import Preempted
from fcos_d2.engine.setup import truncate_metrics
from fcos_d2.errors import InputError

from ..tiny_training import ROOT, metrics, python, write_config
from .kill_and_resume import find_differences

pytest_plugins = ["tests.script"]

LONGER = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2)
STATEFUL = ("MODEL_EMA.ENABLED", True, "MODEL.FCOS.LOSS_NORMALIZER_CLS", "moving_fg")


# ---- SIGKILL ----


def kill_and_resume(folder: Path, config: Path, kills: int, *options) -> list:
    words = [ROOT / "tests/engine/kill_and_resume.py", folder, config, kills, 0, *options]
    done = python(*words, cwd=folder, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_killed_at_random_points_is_bitwise_reproducible(tmp_path):
    options = ("SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 10)
    options += ("SOLVER.OPTIMIZER", "SGD")
    points = kill_and_resume(tmp_path, write_config(tmp_path / "data"), 4, *options, *STATEFUL)
    assert len(points) == 4


@pytest.mark.slow
def test_training_on_digits_killed_twenty_times_is_bitwise_reproducible(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    config = ROOT / "configs/digits/fcos_R_18_FPN_digits.yaml"
    options = ("SOLVER.MAX_ITER", 200, "SOLVER.CHECKPOINT_PERIOD", 7, "TEST.EVAL_PERIOD", 0)
    options += ("VIS_PERIOD", 0, "DATASETS.TEST", "()", "INPUT.RANDOM_FLIP", "horizontal")
    points = kill_and_resume(tmp_path, config, 20, *options, *STATEFUL)
    assert len(points) == 20


# ---- SIGTERM ----


class Terminate(HookBase):
    """Sends SIGTERM to this process in iteration 2."""

    def before_step(self):
        if self.trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def terminating(monkeypatch, in_evaluation: bool = False):
    build_hooks, test = Trainer.build_hooks, Trainer.test
    with monkeypatch.context() as patch:
        if in_evaluation:

            def terminated(cls, cfg, model):
                os.kill(os.getpid(), signal.SIGTERM)
                return test(cfg, model)

            patch.setattr(Trainer, "test", classmethod(terminated))
        else:
            patch.setattr(Trainer, "build_hooks", lambda self: [*build_hooks(self), Terminate()])
        yield


@pytest.mark.parametrize("in_evaluation", [False, True], ids=["in a step", "in an evaluation"])
def test_sigterm_saves_a_checkpoint_and_sets_the_exit_status(script, monkeypatch, in_evaluation):
    options = (*LONGER, *STATEFUL, "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 3)
    before = signal.getsignal(signal.SIGTERM)
    assert script(*options, "OUTPUT_DIR", "reference").status == 0
    with terminating(monkeypatch, in_evaluation):
        result = script(*options)
    assert result.status == Preempted.STATUS == 75
    assert result.err.splitlines()[-1].startswith("stopped by SIGTERM") and "--resume" in result.err
    assert "Traceback" not in result.out + result.err
    assert signal.getsignal(signal.SIGTERM) is before
    output = script.folder / "output"
    assert (output / "last_checkpoint").read_text() == "model_0000002.pth"
    assert script("--resume", *options).status == 0
    finals = [torch.load(script.folder / f / "model_final.pth") for f in ("output", "reference")]
    assert find_differences(*finals) == []


def test_sigterm_in_the_last_iteration_defers_the_evaluation_to_resume(script, monkeypatch):
    with terminating(monkeypatch):
        result = script("SOLVER.MAX_ITER", 3)
    assert result.status == Preempted.STATUS
    assert (script.folder / "output/last_checkpoint").read_text() == "model_final.pth"
    assert "bbox/AP" not in str(metrics(script.folder / "output"))
    result = script("--resume", "SOLVER.MAX_ITER", 3)
    assert result.status == 0 and "Starting training from iteration 3" in result.out
    assert "bbox/AP" in metrics(script.folder / "output")[-1]


# ---- full disks, incomplete files ----


@contextmanager
def limit_file_size(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_does_not_need_posix_signals_and_opening_of_folders(script, monkeypatch):
    """Windows supports neither."""
    open_file = os.open

    def open_no_folder(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return open_file(path, flags, *args, **kwargs)

    for name in ("pthread_sigmask", "sigwait", "sigwaitinfo", "pthread_kill", "alarm", "SIGKILL"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(os, "open", open_no_folder)
    assert script(*LONGER, "DATASETS.TEST", "()").status == 0
    assert (script.folder / "output/last_checkpoint").read_text() == "model_final.pth"


def test_full_disk_is_a_one_line_error_and_keeps_the_last_checkpoint(script):
    options = (*LONGER, "DATASETS.TEST", "()")
    assert script(*options, "SOLVER.MAX_ITER", 2).status == 0
    output = script.folder / "output"
    before = (output / "model_final.pth").read_bytes()
    with limit_file_size(1_000_000):
        result = script("--resume", *options)
    assert result.status == 2 and result.err.count("\n") == 1
    for part in (
        "model_0000003.pth: File too large",
        "output/model_final.pth is intact",
        "--resume",
    ):
        assert part in result.err
    assert "Traceback" not in result.out
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert (output / "model_final.pth").read_bytes() == before
    assert sorted(p.name for p in output.glob("model*")) == ["model_0000001.pth", "model_final.pth"]
    assert script("--resume", *options).status == 0


def test_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


def test_next_checkpoint_removes_partial_files_of_a_killed_process(tmp_path):
    (tmp_path / "model_0000001.pth.partial").write_bytes(b"cut off")
    Checkpointer(nn.Linear(2, 2), str(tmp_path)).save("model_0000002")
    assert {p.name for p in tmp_path.iterdir()} == {"model_0000002.pth", "last_checkpoint"}


def test_unwritable_first_checkpoint_is_an_error_without_an_earlier_checkpoint(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path / "absent"))
    with pytest.raises(InputError, match="No such file or directory; there is no earlier"):
        checkpointer.save("model_0000001")


# ---- other settings ----


def test_resuming_uses_and_logs_a_changed_learning_rate_and_schedule(script):
    options = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(9,)", "DATASETS.TEST", "()")
    assert script(*options, "SOLVER.CHECKPOINT_PERIOD", 2).status == 0
    output = script.folder / "output"
    whole = torch.load(output / "model_final.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    changes = ("SOLVER.BASE_LR", 0.0001, "SOLVER.STEPS", "(3,)", "SOLVER.WEIGHT_DECAY", 0.5)
    result = script("--resume", *options, *changes, "SOLVER.CHECKPOINT_PERIOD", 2)
    (line,) = [line for line in result.out.splitlines() if "training continues with" in line]
    for part in ("BASE_LR 0.0001 (was 0.001)", "STEPS (3,) (was (9,))", "WEIGHT_DECAY 0.5 (was "):
        assert f"SOLVER.{part}" in line
    assert line.count("SOLVER.") == 3
    resumed = torch.load(output / "model_final.pth")
    groups = [
        saved["trainer"]["_trainer"]["optimizer"]["param_groups"] for saved in (whole, resumed)
    ]
    assert groups[0][0]["lr"] == pytest.approx(0.001) and groups[0][0]["weight_decay"] == 0.0001
    assert groups[1][0]["lr"] == pytest.approx(0.00001) and groups[1][0]["weight_decay"] == 0.5
    (output / "last_checkpoint").write_text("model_0000001.pth")
    result = script("--resume", *options, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert "training continues with" not in result.out


# ---- metrics ----


def test_metrics_of_repeated_iterations_are_removed(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 19, "a": 1}\n{"iteration": 39, "a": 2}\n{"iterat')
    with open(path, "a") as writer:  # like the trainer's, which is already open
        truncate_metrics(path, 30)
        writer.write('{"iteration": 39, "a": 3}\n')
    assert metrics(tmp_path) == [{"iteration": 19, "a": 1}, {"iteration": 39, "a": 3}]
    truncate_metrics(path, 40)
    assert len(metrics(tmp_path)) == 2
    truncate_metrics(tmp_path / "absent.json", 0)
