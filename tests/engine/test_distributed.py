"""Distributed training with gloo on the CPU matches training in a single process."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fcos_d2.engine import run_script
from fcos_d2.engine.distributed import TORCHRUN, is_torchrun, wrap_ddp
from fcos_d2.engine.hooks import Preempted
from fcos_d2.engine.trainer import scale_to_processes
from fcos_d2.errors import InputError

from ..tiny_training import ROOT, metrics, python, write_config

pytest_plugins = ["tests.script"]

# Without BN, whose statistics are per process, and without Adam, which amplifies rounding errors of
# small gradients.
OPTIONS = ("MODEL.RESNETS.NORM", "GN", "SOLVER.OPTIMIZER", "SGD", "SOLVER.IMS_PER_BATCH", 4)
OPTIONS += ("SOLVER.MAX_ITER", 5, "SOLVER.BASE_LR", 0.01, "DATALOADER.NUM_WORKERS", 1)
OPTIONS += ("MODEL_EMA.ENABLED", True)


def torchrun(script, *words, cwd, **options):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script]
    return python(*command, *words, cwd=cwd, **options)


def test_two_processes_match_a_single_process(tmp_path):
    done = torchrun(ROOT / "tests/engine/two_processes.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    assert sorted(done.stdout.splitlines()) == ["agreed 0", "agreed 1"]


def test_torchrun_trains_and_evaluates_as_a_single_process(script, tmp_path):
    config = write_config(tmp_path / "data")
    words = ("--config-file", config, *OPTIONS, "OUTPUT_DIR", "two")
    done = torchrun(ROOT / "train_net.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    assert script(*OPTIONS, "OUTPUT_DIR", "one").status == 0
    one, two = (torch.load(tmp_path / f / "model_final.pth") for f in ("one", "two"))
    assert two["trainer"]["_trainer"]["data_loader"]["num_processes"] == 2
    assert len(two["trainer"]["_trainer"]["rng_states"]) == 2
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-5, atol=1e-5)
    momenta = (c["trainer"]["_trainer"]["optimizer"]["state"] for c in (two, one))
    torch.testing.assert_close(*momenta, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*map(metrics, (tmp_path / "two", tmp_path / "one")), strict=True):
        ours = {key: value for key, value in ours.items() if not key.startswith("fcos/")}
        assert ours == pytest.approx({key: theirs[key] for key in ours}, rel=1e-4, nan_ok=True)
    assert any("bbox/AP" in line for line in metrics(tmp_path / "two"))


@pytest.mark.slow
def test_two_processes_evaluate_as_a_single_process(script, tmp_path):
    config = write_config(tmp_path / "data")
    assert script("SOLVER.MAX_ITER", 60, "DATASETS.TEST", "()").status == 0
    words = ("--eval-only", "MODEL.WEIGHTS", tmp_path / "output/model_final.pth")
    alone = script(*words).results[0]["bbox"]
    expected = f'[["bbox", "AP", {alone["AP"]}, 0.0], ["bbox", "AP50", {alone["AP50"]}, 0.0]]'
    assert alone["AP"] > 0
    words = ("--config-file", config, *words, "TEST.EXPECTED_RESULTS", expected)
    done = torchrun(ROOT / "train_net.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]


PREEMPTED = """
import os, signal, sys, time
import train_net
from detectron2.engine import HookBase, default_argument_parser
from fcos_d2.engine import Trainer, run_script


class Terminate(HookBase):
    def before_step(self):
        if self.trainer.iter == 2 and os.environ["RANK"] == "1" and "--resume" not in sys.argv:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which forwards it
            while not self.trainer._trainer.stop_requested:
                time.sleep(0.01)


build_hooks = Trainer.build_hooks
Trainer.build_hooks = lambda self: [*build_hooks(self), Terminate()]
sys.exit(run_script(train_net.main, default_argument_parser().parse_args()))
"""


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_resumes(tmp_path):
    (tmp_path / "preempted.py").write_text(PREEMPTED)
    words = ("--config-file", write_config(tmp_path / "data"), *OPTIONS, "DATASETS.TEST", "()")
    done = torchrun(tmp_path / "preempted.py", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("stopped by SIGTERM; everything is saved") == 2, done.stderr[-5000:]
    assert (tmp_path / "output/last_checkpoint").read_text() == "model_0000002.pth"
    done = torchrun(tmp_path / "preempted.py", "--resume", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Starting training from iteration 3" in done.stdout


# ---- launching ----


ARGS = SimpleNamespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")


def spawn_failing(monkeypatch, error: Exception) -> int:
    """Returns the exit status of a script whose processes fail with ``error``."""

    def launch(*args, **kwargs):
        raise error

    monkeypatch.setattr("fcos_d2.engine.launch.launch", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return run_script(lambda args: None, ARGS)


def test_input_error_of_a_spawned_process_is_printed_in_one_line(monkeypatch, capsys):
    text = (
        "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call "
        "last):\n  File 'x.py', line 1\nfcos_d2.errors.InputError: no such data; do that\n"
    )
    error = torch.multiprocessing.ProcessRaisedException(text, 1, 4242)
    assert spawn_failing(monkeypatch, error) == 2
    assert capsys.readouterr().err == "error: no such data; do that\n"


def test_script_exits_with_the_status_of_its_preempted_processes(monkeypatch, capsys):
    def exited(status):
        return torch.multiprocessing.ProcessExitedException("exited", 0, 4242, exit_code=status)

    assert spawn_failing(monkeypatch, exited(Preempted.STATUS)) == Preempted.STATUS
    assert "stopped by SIGTERM" in capsys.readouterr().err
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        spawn_failing(monkeypatch, exited(1))


def test_sigterm_is_forwarded_to_spawned_processes(monkeypatch):
    def launch(main, *args, **kwargs):
        context = torch.multiprocessing.get_context("fork")
        ready = context.Event()
        child = context.Process(target=_exit_on_sigterm, args=(ready,))
        child.start()
        ready.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        child.join()
        assert child.exitcode == Preempted.STATUS
        message = "process 0 exited"
        raise torch.multiprocessing.ProcessExitedException(message, 0, 1, child.exitcode)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("fcos_d2.engine.launch.launch", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run_script(lambda args: None, ARGS) == Preempted.STATUS
    assert signal.getsignal(signal.SIGTERM) is before


def _exit_on_sigterm(ready) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(Preempted.STATUS))
    ready.set()
    while True:
        signal.pause()


def test_missing_gpus_are_an_error_that_suggests_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run_script(lambda args: None, ARGS) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


def test_more_torchrun_processes_than_gpus_are_rejected(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in zip(TORCHRUN, "1122", strict=True):
        monkeypatch.setenv(name, value)
    assert is_torchrun() and run_script(lambda args: None, ARGS) == 2
    error = capsys.readouterr().err
    assert "2 processes, but only 1 GPU is available; pass --nproc-per-node 1" in error


def test_sync_bn_on_the_cpu_is_rejected_also_in_a_single_process(tmp_path):
    group = {"init_method": f"file://{tmp_path}/group", "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **group)
    try:
        with pytest.raises(InputError, match="SyncBN needs GPUs"):
            wrap_ddp(nn.SyncBatchNorm(3))
    finally:
        dist.destroy_process_group()


# ---- scaling ----


def set_solver(cfg, **solver):
    cfg.merge_from_list([x for k, v in solver.items() for x in (f"SOLVER.{k}", v)])
    return cfg


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)


def test_reference_world_size_scales_the_schedule(fcos_cfg, two_processes):
    schedule = {"IMS_PER_BATCH": 16, "BASE_LR": 0.01, "MAX_ITER": 90, "STEPS": (60, 80)}
    cfg = set_solver(fcos_cfg, **schedule, WARMUP_ITERS=10, REFERENCE_WORLD_SIZE=8)
    solver = scale_to_processes(cfg).SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (4, 0.0025, 360)
    assert (solver.STEPS, solver.WARMUP_ITERS) == ((240, 320), 40)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert scale_to_processes(cfg).SOLVER.MAX_ITER == 90


def test_reference_world_size_that_does_not_divide_the_batch_is_rejected(fcos_cfg):
    cfg = set_solver(fcos_cfg, IMS_PER_BATCH=15, REFERENCE_WORLD_SIZE=8)
    with pytest.raises(InputError, match="REFERENCE_WORLD_SIZE 8 does not divide .*IMS_PER_BATCH"):
        scale_to_processes(cfg)
