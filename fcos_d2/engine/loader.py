"""Training batches whose order and augmentation depend on a seed and a position, and nothing else.

detectron2's loader hands its sampler to the workers, so that what comes next lies in the memory of
several processes. Here batches are put together from indices before any image is read, and every
sample is augmented with random numbers of its own. So a training goes on exactly where it was
killed, and neither the number of workers nor the number of processes changes what is learned.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from ctypes import c_byte
from functools import lru_cache, partial
from itertools import islice
from multiprocessing.util import Finalize

import torch
from detectron2.data import DatasetFromList
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..errors import InputError
from .random_state import kept_random_state, seed_generators

# How long a worker that was told to terminate goes on, for its training to be saved meanwhile.
WORKER_GRACE = 120  # seconds

MakeSampler = Callable[[int], Sampler]


class TrainLoader:
    """Endless batches of mapped records, for one of the processes that train together.

    Iterating starts, in this order, behind the position that ``load_state_dict`` set. Batch n is
    the same whatever ``num_workers`` is; with P processes, batch n of all of them together holds
    the samples of batch n of a single one (without aspect ratio grouping).

    Args:
        dataset: records, or a map-style data set of them.
        mapper: record -> sample; None for a sample that is to be replaced by another one.
        make_sampler: seed -> one of detectron2's training samplers. Default: TrainingSampler.
        total_batch_size: images per batch, of all processes together.
        aspect_ratio_grouping: only images wider than high, or only others, in a batch; records
            need ``width`` and ``height``.
        num_workers: processes that read images; 0 reads in this one.
        seed: of order and augmentation, the same for all processes. Default: drawn.

    Raises:
        InputError: a batch that cannot be divided among the processes, a record without size, or a
            data set without a length.
    """

    def __init__(
        self,
        dataset: Sequence[dict] | Dataset,
        *,
        mapper: Callable[[dict], dict | None],
        make_sampler: MakeSampler | None = None,
        total_batch_size: int,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        seed: int | None = None,
    ):
        if not isinstance(dataset, Sized):
            raise InputError(
                f"the training data is of type {type(dataset).__name__}, which has no length; "
                "register a list of records or a torch Dataset with __len__ and __getitem__"
            )
        self._batch_size = _share(total_batch_size)
        self._is_portrait = _is_portrait(dataset) if aspect_ratio_grouping else None
        self._make_sampler = make_sampler or partial(_shuffle, len(dataset))
        self._records = DatasetFromList(dataset, copy=False) if _is_list(dataset) else dataset
        self._mapper, self._num_workers = mapper, num_workers
        self._seed = comm.shared_random_seed() if seed is None else seed
        self._images = 0  # that were taken before the batches below were counted
        self._batches = 0

    def __iter__(self) -> Iterator[list[dict]]:
        loader = DataLoader(
            _Samples(self._records, self._mapper, self._seed),
            batch_sampler=_Iterable(self._draws),
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_outlive_sigterm, _leaving()),
            # Of its own, so that starting to read draws nothing from the training's generator.
            generator=torch.Generator(),
        )
        with _held_back(signal.SIGTERM):  # until the workers know what to do about it
            batches = iter(loader)
        for batch in batches:
            self._batches += 1
            yield batch

    def state_dict(self) -> dict:
        """The seed, and what was handed out so far."""
        return {
            "seed": self._seed,
            "images": self._images,
            "batches": self._batches,
            "batch_size": self._batch_size,
            "num_processes": comm.get_world_size(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes to the position of ``state``, which may be of another number of processes."""
        self._seed = state["seed"]
        self._images, self._batches = state["images"], state["batches"]
        split = state["batch_size"], state["num_processes"]
        if split != (self._batch_size, comm.get_world_size()):
            # Other batches than those that were counted: go on from the next image.
            self._images += self._batches * state["batch_size"] * state["num_processes"]
            self._batches = 0

    def _draws(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (draw, index of the record); the draws of all processes count 0, 1, 2..."""
        rank, step = comm.get_rank(), comm.get_world_size()
        taken = max(0, -(-(self._images - rank) // step))
        stream = islice(self._make_sampler(self._seed), taken, None)
        draws = ((rank + (taken + n) * step, index) for n, index in enumerate(stream))
        return islice(self._grouped(draws), self._batches, None)

    def _grouped(self, draws: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        groups: tuple[list, list] = [], []
        for draw, index in draws:
            group = groups[self._is_portrait[index] if self._is_portrait else 0]
            group.append((draw, index))
            if len(group) == self._batch_size:
                yield list(group)
                group.clear()


def sampler_from_config(cfg, records: Sequence[dict]) -> MakeSampler:
    """DATALOADER.SAMPLER_TRAIN as a function of the seed.

    Raises:
        InputError: a sampler that is not known.
    """
    name, loader = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER
    if name == "TrainingSampler":
        return partial(_shuffle, len(records))
    if name == "RepeatFactorTrainingSampler":
        count = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        factors = count(records, loader.REPEAT_THRESHOLD)
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        size, ratio = len(records), loader.RANDOM_SUBSET_RATIO
        return lambda seed: RandomSubsetTrainingSampler(
            size, ratio, seed_shuffle=seed, seed_subset=seed
        )
    raise InputError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; set it to TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


class _Samples(Dataset):
    """Maps the record of a (draw, index) pair, with random numbers that the draw decides."""

    def __init__(self, records: Sequence[dict], mapper: Callable, seed: int):
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, draw_and_index: tuple[int, int]) -> dict:
        draw, index = draw_and_index
        # A worker has no other use for its generators; this process may be the one that trains.
        in_worker = get_worker_info() is not None
        with contextlib.nullcontext() if in_worker else kept_random_state():
            seed_generators(self._seed, draw)
            sample = self._mapper(self._records[index])
            while sample is None:
                other = torch.randint(len(self._records), ()).item()
                sample = self._mapper(self._records[other])
        return sample


class _Iterable:
    """What ``make_iterator`` returns, as often as asked for."""

    def __init__(self, make_iterator: Callable[[], Iterator]):
        self._make_iterator = make_iterator

    def __iter__(self) -> Iterator:
        return self._make_iterator()


def _shuffle(size: int, seed: int) -> Sampler:
    return TrainingSampler(size, seed=seed)


def _as_it_is(batch: list) -> list:
    return batch


def _is_list(dataset: Sequence[dict] | Dataset) -> bool:
    return isinstance(dataset, list)


def _share(total_batch_size: int) -> int:
    processes = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % processes:
        raise InputError(
            f"{total_batch_size} images cannot be divided among {processes} processes; set "
            f"SOLVER.IMS_PER_BATCH to a multiple of {processes} x SOLVER.GRADIENT_ACCUMULATION"
        )
    return total_batch_size // processes


def _is_portrait(dataset: Sequence[dict] | Dataset) -> list[bool]:
    records = (dataset[index] for index in range(len(dataset)))
    try:
        return [record["width"] <= record["height"] for record in records]
    except KeyError as error:
        raise InputError(
            f"a record of the training data has no {error}, which grouping by aspect ratio needs; "
            "set DATALOADER.ASPECT_RATIO_GROUPING False"
        ) from error


def _outlive_sigterm(leaving: c_byte, worker_id: int) -> None:
    """A job that is told to terminate is told in all its processes, but must finish its step.

    The alarm ends a worker whose training forgot it. A training that leaves, with an error perhaps
    whose traceback holds on to the loader, terminates its workers too, and waits for them.
    """

    def on_signal(number: int, frame: object) -> None:
        if leaving.value:
            os._exit(0)
        signal.alarm(WORKER_GRACE)

    signal.signal(signal.SIGTERM, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Lets a signal wait, here and in the processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@lru_cache(maxsize=1)
def _leaving() -> c_byte:
    """Says to the workers whether this process is on its way out."""
    flag = multiprocessing.Value("b", False, lock=False)
    # Runs right before multiprocessing terminates the workers, which atexit does in the first
    # process alone.
    Finalize(None, setattr, (flag, "value", True), exitpriority=0)
    return flag
