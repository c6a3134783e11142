"""Hostile input for everything that reads what others made: weights, annotations, ops.

Each target is a module with ``check(data: bytes)``, which makes one input of the bytes, hands it
to fcos_d2, and fails unless the outcome is a valid result or an error that says what is wrong. The
same function is run by atheris (``python -m tests.fuzz TARGET``), by hypothesis and by the replay
of the corpus, the last two in the normal suite.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

TARGETS = ("weights", "annotations", "ops")
CORPUS = Path(__file__).parent / "corpus"  # cases found once, and a seed of every kind


def checker(target: str) -> Callable[[bytes], None]:
    """``check`` of a target, which is imported only now, so that atheris can instrument it."""
    return importlib.import_module(f"{__name__}.{target}").check
