"""The state of every random number generator that training draws from, to save and to restore."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def random_state() -> dict:
    """States of Python's, numpy's and torch's generators, of types that load_safely gives back."""
    numpy_state = np.random.get_state(legacy=False)
    words = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {
            "key": words,
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        # Only of the device of this process: the others belong to other processes.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict) -> None:
    """Puts every generator where it was when ``random_state`` returned ``state``."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    position = {"key": saved["key"].numpy().astype(np.uint32), "pos": saved["pos"]}
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": position,
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """What runs in this block draws random numbers without anybody noticing afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def seed_generators(*numbers: int) -> None:
    """Seeds the generators that augmentations use from non-negative ``numbers``; not CUDA's."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    np.random.seed(words)
    random.seed(words.tobytes())
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
