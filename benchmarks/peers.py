"""Finds optional peers: installed ones are measured, missing ones are reported once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

INSTALL = {
    "detectron2": "python tools/install_detectron2.py",
    "fvcore": "pip install fvcore",
    "onnxruntime": "pip install onnxruntime",
    "openvino": "pip install openvino",
    "torchvision": "pip install torchvision",
}

Make = Callable[..., dict[str, Callable]]


def needs(package: str) -> Callable[[Make], Make]:
    """Decorates a function that returns peers by name, to return none without ``package``."""

    def decorate(make: Make) -> Make:
        @functools.wraps(make)
        def peers(*arguments) -> dict[str, Callable]:
            return make(*arguments) if find_spec(package) else {}

        return peers

    return decorate


def missing() -> str:
    """Returns a line on missing peers and how to install them; empty if there are none."""
    names = [f"{name} (`{how}`)" for name, how in INSTALL.items() if not find_spec(name)]
    return f"Not installed, so not measured: {', '.join(names)}." if names else ""
