"""Reads checkpoint files without running any code in them.

``torch.load(weights_only=True)`` reads ``torch.save`` files, the safetensors library reads its own
format, and anything else must be a plain pickle of NumPy arrays. A pickle is a program, so it may
reference only the globals in ``ALLOWED`` and those that torch allows.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict

import numpy as np
import safetensors.torch
import torch
from detectron2.utils.file_io import PathManager

from ..errors import InputError, format_value, one_line_cause

# torch.save files begin like a zip file, or with a pickled magic number (before torch 1.6).
ZIP = b"PK\x03\x04"
LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


class Ignored:
    """Replaces an object that is not needed, whatever it contains."""

    def __init__(self, *args: object):
        pass


class DType:
    """Replaces numpy.dtype, with which a file could pass off bytes as object pointers."""

    def __init__(self, code: str, *flags: object):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)", code):  # torch has these
            raise ValueError(f"it holds an array of dtype {format_value(code)}, not of numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.value = self.value.newbyteorder(state[1])


class Array(np.ndarray):
    """An array that unpickles only with a numeric DType."""

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, data = state
        super().__setstate__((1, shape, dtype.value, is_fortran, data))


def _empty_array(*args: object) -> Array:
    return np.ndarray.__new__(Array, (0,), np.uint8)


def _array(data: bytes, dtype: DType, shape: tuple, order: str, axes: object = None) -> np.ndarray:
    array = np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")
    return array if order != "K" else array.transpose(axes)


def _number(dtype: DType, data: bytes | str) -> float:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.value, count=1)[0].item()


# Globals that a pickle may reference, and their replacements; torch.load also allows its own.
ALLOWED: dict[str, object] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.bytes": bytes,
    "_codecs.encode": lambda text, codec: text.encode("latin1"),  # bytes in protocols 0 to 2
    "numpy.dtype": DType,
    "numpy.ndarray": Array,
    **{
        f"numpy.{core}.{name}": stub
        for core in ("core", "_core")  # before NumPy 2, and since then
        for name, stub in (
            ("multiarray._reconstruct", _empty_array),
            ("multiarray.scalar", _number),
            ("numeric._frombuffer", _array),
        )
    },
    # What the training scripts of torchvision and mmdetection save along with the weights.
    "argparse.Namespace": Ignored,
    "mmengine.logging.history_buffer.HistoryBuffer": Ignored,
    "builtins.getattr": Ignored,  # how a HistoryBuffer refers to its own methods
    "mmengine.config.config.ConfigDict": dict,
    "mmcv.utils.config.ConfigDict": dict,
}


def check_url(path: str) -> None:
    """Refuses a URL that iopath would store outside its cache because of ``..``.

    Raises:
        InputError: the URL has ``..`` in its path.
    """
    if "://" in path and ".." in re.split(r"[/?#]", path):
        raise InputError(f"URL {format_value(path)} leads out of its folder; write it without ..")


def load_safely(path: str) -> object:
    """Loads a torch.save file, a safetensors file or a pickle of arrays without running code in it.

    Args:
        path: may be a URL.

    Returns:
        The saved object. Dicts of any kind become plain dicts, and objects other than tensors and
        plain data become ``Ignored``.

    Raises:
        InputError: the file is truncated, is not a checkpoint, or would run code.
        OSError: it cannot be opened.
    """
    local = PathManager.get_local_path(path)
    with open(local, "rb") as file:
        start = file.read(40)
    try:
        return _plain(_load(local, start))
    except Exception as error:  # these libraries raise many types of errors for a broken file
        raise _refusal(path, error) from error


def load_trusted(path: str) -> object:
    """Loads a file from a trusted author, running whatever code it contains."""
    with open(path, "rb") as file:
        if _is_torch(file.read(40)):
            return torch.load(path, map_location="cpu", weights_only=False)
        file.seek(0)
        return pickle.load(file, encoding="latin1")


def _is_torch(start: bytes) -> bool:
    return start.startswith(ZIP) or LEGACY in start


def _load(path: str, start: bytes) -> object:
    if start[8:9] == b"{":  # after the header size
        return safetensors.torch.load_file(path)
    if _is_torch(start):
        stubs = [(stub, name) for name, stub in ALLOWED.items()]
        with torch.serialization.safe_globals(stubs):
            is_zip = start.startswith(ZIP)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    with open(path, "rb") as file:
        return _Unpickler(file, encoding="latin1").load()


class _Unpickler(pickle.Unpickler):
    """See "Restricting Globals" in the documentation of pickle."""

    def find_class(self, module: str, name: str) -> object:
        path = f"{module.replace('__builtin__', 'builtins')}.{name}"  # Python 2's name
        if path not in ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {path}")
        return ALLOWED[path]


def _plain(value: object) -> object:
    """Copies dicts without instance attributes, which a file could use to shadow their methods."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in dict.items(value)}
    return value


def _refusal(path: str, error: Exception) -> InputError:
    cause = one_line_cause(error)
    name = re.search(r"GLOBAL (\S+)", cause)  # in torch's messages and ours
    if name:
        return InputError(
            f"{path} was not loaded because it would call {format_value(name[1])}; if you trust "
            "its author, extract its tensors with fcos-d2 convert --trust-pickle "
            f"{path} OUT.safetensors"
        )
    cause = cause.rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]
    return InputError(
        f"{path} is not a checkpoint that can be read ({format_value(cause)}); copy it again, or "
        "save its tensors alone with torch.save(model.state_dict(), FILE)"
    )
