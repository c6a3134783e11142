"""Training batches whose order and augmentation depend only on a seed and a position.

detectron2's samplers run ahead of training in its workers, and torchdata's StatefulDataLoader
resumes only with the same number of workers and processes. Here, batches of indices are formed
before any image is read, and every sample is augmented with random numbers of its own: training
resumes where it was killed, and the numbers of workers and processes do not affect the result.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from itertools import islice

import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError
from .rng import fork_rng, seed_rng

MakeSampler = Callable[[int], Sampler]


class TrainLoader:
    """Infinite batches of mapped records for one process of a training run.

    Batch n does not depend on ``num_workers``; batches n of all processes together hold the samples
    of batch n of a single process (without aspect ratio grouping).

    Args:
        dataset: records, or a map-style dataset of them.
        mapper: record -> sample, or None to replace the sample with another one.
        make_sampler: seed -> one of detectron2's training samplers. Default: TrainingSampler.
        total_batch_size: images per batch, over all processes.
        aspect_ratio_grouping: whether to batch landscape images separately from the others;
            records need ``width`` and ``height``.
        num_workers: processes that read images; with 0, this process does.
        seed: for order and augmentation, the same on all processes. Default: random.

    Raises:
        InputError: the batch cannot be divided among the processes, a record has no size, or the
            dataset has no length.
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
        self.batch_size = split_batch(total_batch_size)
        self._is_portrait = _is_portrait(dataset) if aspect_ratio_grouping else None
        self._make_sampler = make_sampler or partial(_shuffle, len(dataset))
        is_list = isinstance(dataset, list)  # serialized once, for all workers
        self.dataset = DatasetFromList(dataset, copy=False) if is_list else dataset
        self._mapper, self._num_workers = mapper, num_workers
        self._seed = comm.shared_random_seed() if seed is None else seed
        self._images = 0  # consumed before self._batches started to count
        self._batches = 0

    def __iter__(self) -> Iterator[list[dict]]:
        loader = DataLoader(
            _Samples(self.dataset, self._mapper, self._seed),
            batch_sampler=self._batches_of_draws(),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_obey_parent,
            # Its own, so that starting an iteration does not advance the global generator.
            generator=torch.Generator(),
        )
        with _sigterm_blocked():  # permanently in the workers
            batches = iter(loader)
        for batch in batches:
            self._batches += 1
            yield batch

    def state_dict(self) -> dict:
        """Returns the seed and the position."""
        return {
            "seed": self._seed,
            "images": self._images,
            "batches": self._batches,
            "batch_size": self.batch_size,
            "num_processes": comm.get_world_size(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues at the position of ``state``, perhaps with another number of processes."""
        self._seed = state["seed"]
        self._images, self._batches = state["images"], state["batches"]
        split = state["batch_size"], state["num_processes"]
        if split != (self.batch_size, comm.get_world_size()):
            # The counted batches were divided differently: continue with the next image.
            self._images += self._batches * state["batch_size"] * state["num_processes"]
            self._batches = 0

    def _batches_of_draws(self) -> Iterator[list[tuple[int, int]]]:
        """Yields batches of (draw, record index); draws are counted over all processes."""
        rank, step = comm.get_rank(), comm.get_world_size()
        taken = max(0, -(-(self._images - rank) // step))
        stream = islice(self._make_sampler(self._seed), taken, None)
        draws = ((rank + (taken + n) * step, index) for n, index in enumerate(stream))
        return islice(self._grouped(draws), self._batches, None)

    def _grouped(self, draws: Iterator[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        groups: tuple[list, list] = [], []
        for draw, index in draws:
            group = groups[self._is_portrait[index] if self._is_portrait else 0]
            group.append((draw, index))
            if len(group) == self.batch_size:
                yield list(group)
                group.clear()


class _Samples(Dataset):
    """Maps the record of a (draw, index) pair with random numbers determined by the draw."""

    def __init__(self, records: Sequence[dict], mapper: Callable, seed: int):
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, draw_and_index: tuple[int, int]) -> dict:
        draw, index = draw_and_index
        with fork_rng():
            seed_rng(self._seed, draw)
            sample = self._mapper(self._records[index])
            while sample is None:
                other = torch.randint(len(self._records), ()).item()
                sample = self._mapper(self._records[other])
        return sample


def sampler_from_config(cfg, records: Sequence[dict]) -> MakeSampler:
    """Returns a function that builds DATALOADER.SAMPLER_TRAIN from a seed."""
    name, loader, size = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER, len(records)
    if name == "TrainingSampler":
        return partial(_shuffle, size)
    if name == "RepeatFactorTrainingSampler":
        count = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        factors = count(records, loader.REPEAT_THRESHOLD)
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        subset = partial(RandomSubsetTrainingSampler, size, loader.RANDOM_SUBSET_RATIO)
        return lambda seed: subset(seed_shuffle=seed, seed_subset=seed)
    raise InputError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; set it to TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


def split_batch(images: int, accumulation: int = 1) -> int:
    """Divides ``images`` among all processes and ``accumulation`` batches.

    Raises:
        InputError: they cannot be divided evenly.
    """
    parts = comm.get_world_size() * max(accumulation, 1)
    if accumulation < 1 or images < 1 or images % parts:
        raise InputError(
            f"{images} images (SOLVER.IMS_PER_BATCH) cannot be divided among "
            f"{comm.get_world_size()} processes x {accumulation} batches "
            f"(SOLVER.GRADIENT_ACCUMULATION); set SOLVER.IMS_PER_BATCH to a multiple of {parts}"
        )
    return images // parts


def _shuffle(size: int, seed: int) -> Sampler:
    return TrainingSampler(size, seed=seed)


def _is_portrait(dataset: Sequence[dict] | Dataset) -> list[bool]:
    records = (dataset[index] for index in range(len(dataset)))
    try:
        return [record["width"] <= record["height"] for record in records]
    except KeyError as error:
        raise InputError(
            f"a record of the training data has no {error}, which grouping by aspect ratio needs; "
            "set DATALOADER.ASPECT_RATIO_GROUPING False"
        ) from error


# A SIGTERM to a job goes to all its processes, but training must finish its iteration. So workers
# exit only on the SIGTERM that their parent sends when it exits. Where sigwaitinfo is missing
# (outside Linux), they cannot tell the sender and exit on any.


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Blocks SIGTERM in this process and in those forked from it meanwhile."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_parent(worker_id: int) -> None:
    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_parent, daemon=True).start()
