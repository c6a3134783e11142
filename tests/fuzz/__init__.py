"""Fuzzes everything that reads untrusted input: weights, annotations, ops.

Each target is a module with ``check(data: bytes)``, which builds an input from the bytes, passes it
to fcos_d2, and fails unless the outcome is a valid result or an error that says what is wrong.
atheris (``python -m tests.fuzz TARGET``), hypothesis and the replay of the corpus all run this
function, the latter two in the normal test suite.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

TARGETS = ("weights", "annotations", "ops")
CORPUS = Path(__file__).parent / "corpus"  # past failures, and a seed of every kind


def checker(target: str) -> Callable[[bytes], None]:
    """Returns ``check`` of a target, imported only now so that atheris can instrument it."""
    return importlib.import_module(f"{__name__}.{target}").check
