"""Tests the order and augmentation of training batches, and worker processes."""

import json
import multiprocessing
import random
import subprocess
from collections.abc import Iterable
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler

from fcos_d2.engine import TrainLoader
from fcos_d2.engine.loader import split_batch
from fcos_d2.engine.rng import fork_rng, get_rng_state, set_rng_state
from fcos_d2.errors import InputError

from ..tiny_training import python


def draw_numbers() -> tuple:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()


def make_loader(batch_size=3, workers=0, seed=5, **options) -> TrainLoader:
    def mapper(record):
        return {**record, "noise": draw_numbers()}

    records = [{"id": n, "width": n % 3, "height": 1} for n in range(10)]
    options = {"mapper": mapper, "aspect_ratio_grouping": False, **options}
    return TrainLoader(
        records, total_batch_size=batch_size, num_workers=workers, seed=seed, **options
    )


def take(batches: Iterable[list[dict]], count: int) -> list[list[dict]]:
    return list(islice(batches, count))


def ids(batches: list[list[dict]]) -> list[list[int]]:
    return [[sample["id"] for sample in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [False, True])
def test_batches_resume_at_a_saved_position_with_the_same_augmentation(grouping):
    whole = take(make_loader(aspect_ratio_grouping=grouping), 12)
    assert len({sample["noise"] for batch in whole for sample in batch}) == 36
    first = make_loader(aspect_ratio_grouping=grouping)
    assert take(first, 5) == whole[:5]
    second = make_loader(seed=99, aspect_ratio_grouping=grouping)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, 7) == whole[5:]


def test_order_and_augmentation_do_not_depend_on_workers():
    assert take(make_loader(workers=2), 6) == take(make_loader(), 6)


def test_order_matches_detectron2s_sampler():
    order = sum(ids(take(make_loader(), 4)), [])
    assert order == list(islice(TrainingSampler(10, seed=5), 12))
    assert sorted(order[:10]) == list(range(10))


def test_grouped_batches_have_one_orientation():
    for batch in take(make_loader(aspect_ratio_grouping=True), 10):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1


@pytest.fixture
def as_process(monkeypatch):
    """Returns a function that simulates the rank and world size of a process."""

    def simulate(rank: int, size: int):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: size)

    return simulate


def test_processes_divide_the_batches_of_a_single_process(as_process):
    whole = take(make_loader(batch_size=4), 5)
    parts = []
    for rank in range(2):
        as_process(rank, 2)
        parts.append(take(make_loader(batch_size=4), 5))
    for together, batch in zip(zip(*parts, strict=True), whole, strict=True):
        key = lambda sample: (sample["id"], sample["noise"])  # noqa: E731
        assert sorted(together[0] + together[1], key=key) == sorted(batch, key=key)


def test_resuming_with_another_number_of_processes_continues_with_the_next_image(as_process):
    first = make_loader(batch_size=4)
    seen, rest = sum(ids(take(first, 3)), []), []
    state = first.state_dict()
    for rank in range(2):
        as_process(rank, 2)
        second = make_loader(batch_size=4, seed=0)
        second.load_state_dict(state)
        rest.append(sum(ids(take(second, 2)), []))
    as_process(0, 1)
    interleaved = [image for pair in zip(*rest, strict=True) for image in pair]
    assert seen + interleaved == list(islice(TrainingSampler(10, seed=5), 20))


@pytest.mark.parametrize(
    ("images", "accumulation", "processes"), [(3, 1, 2), (6, 4, 1), (6, 0, 1), (0, 1, 1)]
)
def test_indivisible_batch_size_is_rejected(as_process, images, accumulation, processes):
    as_process(0, processes)
    message = f"{images} images .* {processes} processes x {accumulation} .*GRADIENT_ACCUMULATION"
    with pytest.raises(InputError, match=message):
        split_batch(images, accumulation)


def test_data_without_length_or_image_sizes_is_rejected():
    with pytest.raises(InputError, match="'width'.*ASPECT_RATIO_GROUPING False"):
        TrainLoader([{"id": 1}], mapper=dict, total_batch_size=1)
    with pytest.raises(InputError, match="type map, which has no length; register a list"):
        TrainLoader(map(dict, []), mapper=dict, total_batch_size=1)


def test_images_that_the_mapper_skips_are_replaced():
    found = take(make_loader(mapper=lambda record: record if record["id"] % 2 else None), 5)
    assert all(sample["id"] % 2 for batch in found for sample in batch)


# ---- random numbers ----


def test_random_state_is_restored_from_a_file(tmp_path):
    np.random.randn()  # also caches a second number in the state
    torch.save(get_rng_state(), tmp_path / "state.pth")
    first = draw_numbers()
    draw_numbers()
    set_rng_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw_numbers() == first


@pytest.mark.parametrize("use", [lambda: take(make_loader(), 3), fork_rng()(draw_numbers)])
def test_augmentation_and_evaluation_do_not_change_the_random_state(use):
    state = get_rng_state()
    use()
    after = draw_numbers()
    set_rng_state(state)
    assert after == draw_numbers()


# ---- SIGTERM ----


def test_workers_ignore_sigterm():
    batches = iter(make_loader(workers=2))
    assert ids([next(batches)]) == ids(take(make_loader(), 1))
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert ids(take(batches, 20)) == ids(take(make_loader(), 21))[1:]


FAILING = """
from fcos_d2.engine import TrainLoader
from fcos_d2.engine.loader import split_batch
batches = iter(TrainLoader(
    [{}] * 9, mapper=dict, total_batch_size=1, aspect_ratio_grouping=False, num_workers=2
))
next(batches)
raise SystemExit("training failed")
"""


def test_failed_training_run_exits_without_waiting_for_workers(tmp_path):
    done = python("-c", FAILING, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "training failed\n"
