"""Saves, restores and isolates the states of all random number generators used in training."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def get_rng_state() -> dict:
    """Returns the states of Python's, NumPy's and PyTorch's generators in plain types."""
    name, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, key.tolist(), *rest),
        "torch": torch.get_rng_state(),
        # Only for this process's device: the others belong to other processes.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict) -> None:
    """Restores the states that ``get_rng_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def fork_rng() -> Iterator[None]:
    """Like torch.random.fork_rng, but for all generators: restores their states after the block."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def seed_rng(*numbers: int) -> None:
    """Seeds the generators used for augmentation, not CUDA's, with non-negative ``numbers``."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    np.random.seed(words)
    random.seed(words.tobytes())
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
