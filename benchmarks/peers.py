"""Peers are optional: each is measured where it is installed, and what is missing is said once."""

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
    """For a function that returns peers by name: it returns none where ``package`` is missing."""

    def decorate(make: Make) -> Make:
        @functools.wraps(make)
        def peers(*arguments) -> dict[str, Callable]:
            return make(*arguments) if find_spec(package) else {}

        return peers

    return decorate


def missing() -> str:
    """A line that names the peers which are not installed, and what installs them; else empty."""
    names = [f"{name} (`{how}`)" for name, how in INSTALL.items() if not find_spec(name)]
    return f"Not installed, so not measured: {', '.join(names)}." if names else ""
