"""Interruptions: kill -9, SIGTERM and full disks, after which training goes on as if nothing was.

The trainings that are killed run in processes of their own; see kill_and_resume.py.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Iterable
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase
from torch import nn

from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.saving import atomic_write
from fcos_d2.engine import Trainer, TrainLoader
from fcos_d2.engine.hooks import Preempted
from fcos_d2.engine.rng import fork_rng, get_rng_state, set_rng_state
from fcos_d2.engine.setup import truncate_metrics
from fcos_d2.errors import InputError

from ..tiny_training import ROOT, metrics, python, write_config
from .kill_and_resume import differences

pytest_plugins = ["tests.script"]

LONGER = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2)
EVERYTHING = ("MODEL_EMA.ENABLED", True, "MODEL.FCOS.LOSS_NORMALIZER_CLS", "moving_fg")


def draw() -> tuple:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()


# ---- kill -9 ----


def kill_and_resume(folder: Path, config: Path, kills: int, *options) -> dict:
    words = [ROOT / "tests/engine/kill_and_resume.py", folder, config, kills, 0, *options]
    done = python(*words, cwd=folder, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    options = ("SOLVER.MAX_ITER", 30, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 10)
    result = kill_and_resume(tmp_path, write_config(tmp_path / "data"), 3, *options, *EVERYTHING)
    assert result["kills"] == 3


@pytest.mark.slow
def test_digits_killed_twenty_times_end_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    config = ROOT / "configs/digits/fcos_R_18_FPN_digits.yaml"
    options = ("SOLVER.MAX_ITER", 200, "SOLVER.CHECKPOINT_PERIOD", 7, "TEST.EVAL_PERIOD", 0)
    options += ("VIS_PERIOD", 0, "DATASETS.TEST", "()", "INPUT.RANDOM_FLIP", "horizontal")
    result = kill_and_resume(tmp_path, config, 20, *options, *EVERYTHING)
    assert result["kills"] == 20


# ---- SIGTERM ----


class Terminate(HookBase):
    """Sends this process SIGTERM in iteration 2."""

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
def test_sigterm_saves_and_stops_with_a_status_of_its_own(script, monkeypatch, in_evaluation):
    options = (*LONGER, *EVERYTHING, "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 3)
    before = signal.getsignal(signal.SIGTERM)
    assert script(*options, "OUTPUT_DIR", "undisturbed").status == 0
    with terminating(monkeypatch, in_evaluation):
        result = script(*options)
    assert result.status == Preempted.STATUS == 75
    assert result.err.splitlines()[-1].startswith("stopped by SIGTERM") and "--resume" in result.err
    assert "Traceback" not in result.out + result.err
    assert signal.getsignal(signal.SIGTERM) is before
    output = script.folder / "output"
    assert (output / "last_checkpoint").read_text() == "model_0000002.pth"
    assert script("--resume", *options).status == 0
    finals = [torch.load(script.folder / f / "model_final.pth") for f in ("output", "undisturbed")]
    assert differences(*finals) == []


def test_sigterm_in_the_last_iteration_leaves_the_evaluation_to_resume(script, monkeypatch):
    with terminating(monkeypatch):
        result = script("SOLVER.MAX_ITER", 3)
    assert result.status == Preempted.STATUS
    assert (script.folder / "output/last_checkpoint").read_text() == "model_final.pth"
    assert "bbox/AP" not in str(metrics(script.folder / "output"))
    result = script("--resume", "SOLVER.MAX_ITER", 3)
    assert result.status == 0 and "Starting training from iteration 3" in result.out
    assert "bbox/AP" in metrics(script.folder / "output")[-1]


def test_workers_outlive_the_sigterm_of_a_training_that_finishes_its_step():
    batches = iter(loader(workers=2))
    assert ids([next(batches)]) == ids(take(loader(), 1))
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    assert ids(take(batches, 20)) == ids(take(loader(), 21))[1:]


FAILING = """
from fcos_d2.engine import TrainLoader
batches = iter(TrainLoader(
    [{}] * 9, mapper=dict, total_batch_size=1, aspect_ratio_grouping=False, num_workers=2
))
next(batches)
raise SystemExit("a bug of the training")
"""


def test_a_training_that_fails_does_not_wait_for_its_workers(tmp_path):
    done = python("-c", FAILING, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "a bug of the training\n"


# ---- full disks, broken files ----


@contextmanager
def files_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(script):
    options = (*LONGER, "DATASETS.TEST", "()")
    assert script(*options, "SOLVER.MAX_ITER", 2).status == 0
    output = script.folder / "output"
    before = (output / "model_final.pth").read_bytes()
    with files_at_most(1_000_000):
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


def test_a_file_is_replaced_when_it_is_complete_and_not_before(tmp_path):
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


def test_what_a_killed_process_left_is_removed_with_the_next_checkpoint(tmp_path):
    (tmp_path / "model_0000001.pth.partial").write_bytes(b"cut off")
    Checkpointer(nn.Linear(2, 2), str(tmp_path)).save("model_0000002")
    assert {p.name for p in tmp_path.iterdir()} == {"model_0000002.pth", "last_checkpoint"}


def test_an_unwritable_first_checkpoint_says_that_there_is_no_other(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path / "absent"))
    with pytest.raises(InputError, match="No such file or directory; there is no earlier"):
        checkpointer.save("model_0000001")


# ---- metrics ----


def test_metrics_of_iterations_that_come_again_are_forgotten(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 19, "a": 1}\n{"iteration": 39, "a": 2}\n{"iterat')
    with open(path, "a") as writer:  # as the trainer's, which is open already
        truncate_metrics(path, 30)
        writer.write('{"iteration": 39, "a": 3}\n')
    assert metrics(tmp_path) == [{"iteration": 19, "a": 1}, {"iteration": 39, "a": 3}]
    truncate_metrics(path, 40)
    assert len(metrics(tmp_path)) == 2
    truncate_metrics(tmp_path / "absent.json", 0)


# ---- random numbers, order of the data ----


def test_random_state_comes_back_from_a_file(tmp_path):
    np.random.randn()  # leaves a second number behind, which is part of the state
    torch.save(get_rng_state(), tmp_path / "state.pth")
    first = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "state.pth"))
    assert draw() == first


def test_random_numbers_in_a_block_do_not_move_the_others():
    state = get_rng_state()
    with fork_rng():
        draw()
    after = draw()
    set_rng_state(state)
    assert after == draw()


def loader(batch_size=3, workers=0, records=None, seed=5, **options) -> TrainLoader:
    def mapper(record):
        return {**record, "noise": draw()}

    records = [{"id": n, "width": n % 3, "height": 1} for n in range(10)]
    options = {"aspect_ratio_grouping": False, **options}
    return TrainLoader(
        records,
        mapper=mapper,
        total_batch_size=batch_size,
        num_workers=workers,
        seed=seed,
        **options,
    )


def take(batches: Iterable[list[dict]], count: int) -> list[list[dict]]:
    return list(islice(batches, count))


def ids(batches: list[list[dict]]) -> list[list[int]]:
    return [[sample["id"] for sample in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [False, True])
def test_batches_continue_at_a_saved_position_with_the_same_augmentation(grouping):
    whole = take(loader(aspect_ratio_grouping=grouping), 12)
    assert len({sample["noise"] for batch in whole for sample in batch}) == 36
    first = loader(aspect_ratio_grouping=grouping)
    assert take(first, 5) == whole[:5]
    second = loader(seed=99, aspect_ratio_grouping=grouping)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 7) == whole[5:]


def test_workers_change_neither_order_nor_augmentation():
    assert take(loader(workers=2), 6) == take(loader(), 6)


def test_reading_leaves_the_random_numbers_of_the_training_alone():
    state = get_rng_state()
    take(loader(), 3)
    after = draw()
    set_rng_state(state)
    assert after == draw()


def test_every_image_is_seen_once_per_round():
    order = sum(ids(take(loader(batch_size=5), 4)), [])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]


def test_order_is_that_of_detectron2s_sampler():
    assert sum(ids(take(loader(), 4)), []) == list(islice(TrainingSampler(10, seed=5), 12))


def test_grouped_batches_have_one_orientation():
    for batch in take(loader(aspect_ratio_grouping=True), 10):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1


@pytest.fixture
def as_process(monkeypatch):
    """Pretends to be one of several processes."""

    def pretend(rank: int, size: int):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: size)

    return pretend


def test_processes_share_the_batches_of_a_single_one(as_process):
    whole = take(loader(batch_size=4), 5)
    parts = []
    for rank in range(2):
        as_process(rank, 2)
        parts.append(take(loader(batch_size=4), 5))
    for together, batch in zip(zip(*parts, strict=True), whole, strict=True):
        key = lambda sample: (sample["id"], sample["noise"])  # noqa: E731
        assert sorted(together[0] + together[1], key=key) == sorted(batch, key=key)


def test_another_number_of_processes_goes_on_with_the_next_image(as_process):
    first = loader(batch_size=4)
    seen, rest = sum(ids(take(first, 3)), []), []
    state = first.state_dict()
    for rank in range(2):
        as_process(rank, 2)
        second = loader(batch_size=4, seed=0)
        second.load_state_dict(state)
        rest.append(sum(ids(take(second, 2)), []))
    interleaved = [image for pair in zip(*rest, strict=True) for image in pair]
    as_process(0, 1)
    assert seen + interleaved == list(islice(TrainingSampler(10, seed=5), 20))


def test_a_batch_that_processes_cannot_share_is_refused(as_process):
    as_process(0, 2)
    with pytest.raises(InputError, match="3 images .* cannot be divided among 2 processes"):
        loader(batch_size=3)


def test_grouping_needs_the_sizes_of_the_images():
    with pytest.raises(InputError, match="'width'.*ASPECT_RATIO_GROUPING False"):
        TrainLoader([{"id": 1}], mapper=dict, total_batch_size=1)


def test_a_sample_that_the_mapper_refuses_is_replaced():
    records = [{"id": n} for n in range(10)]
    found = take(
        TrainLoader(
            records,
            mapper=lambda record: record if record["id"] % 2 else None,
            total_batch_size=4,
            aspect_ratio_grouping=False,
        ),
        5,
    )
    assert all(sample["id"] % 2 for batch in found for sample in batch)
