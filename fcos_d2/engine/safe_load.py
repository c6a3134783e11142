"""Reads files of weights without running what may be in them.

A pickle is a program. This runs those whose only calls build tensors, arrays and a few plain
records, and refuses all others before they have done anything.
"""

from __future__ import annotations

import collections
import pickle
import re
import zipfile
from _codecs import encode
from typing import IO

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..errors import InputError, one_line_cause

# The first bytes of what torch.save writes: a zip file, or before 1.6 its pickled magic number.
TORCH_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
READ_ERRORS = (
    *(AttributeError, EOFError, ImportError, IndexError, KeyError, OSError, OverflowError),
    *(RuntimeError, TypeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile),
)


class Record:
    """In place of an object that accompanies weights and is not needed, whatever it holds."""

    def __new__(cls, *args, **kwargs):  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


class DType:
    """In place of a numpy dtype: numbers only, whose bytes may come from anywhere."""

    def __init__(self, code, *flags):
        self._code, self._order = code, "="

    def __setstate__(self, state):
        self._order = state[1]

    def numpy(self) -> np.dtype:
        """The dtype.

        Raises:
            ValueError: it is not one of numbers or bool.
        """
        if not re.fullmatch(r"[biufc]\d\d?", str(self._code)):
            raise ValueError(f"arrays of dtype {self._code!r} are not read")
        return np.dtype(self._code).newbyteorder(self._order.replace("|", "="))


class Array:
    """In place of a numpy array, whose own unpickling trusts the file."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _numbers(data, dtype).reshape(shape, order="F" if fortran else "C")

    def tensor(self) -> Tensor:
        """The array's numbers."""
        native = self.value.astype(self.value.dtype.newbyteorder("="))
        return torch.from_numpy(np.ascontiguousarray(native).reshape(self.value.shape))


def _numbers(data: bytes | str, dtype: DType) -> np.ndarray:
    # Python 2 wrote str, which is latin1 here.
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.numpy()) if data else np.empty(0, dtype.numpy())


def _empty_array(*args) -> Array:
    return Array()


def _array(data: bytes, dtype: DType, shape: tuple, order: str) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _number(dtype: DType, data: bytes | str) -> float:
    return _numbers(data, dtype)[0].item()


# What a pickle may call, and what is called instead.
ALLOWED: dict[str, object] = {
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": encode,  # how old protocols write bytes
    "builtins.bytes": lambda: b"",  # and none of them
    "numpy.dtype": DType,
    "numpy.ndarray": Array,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")  # before numpy 2, and since
        for name, function in (
            ("multiarray._reconstruct", _empty_array),
            ("multiarray.scalar", _number),
            ("numeric._frombuffer", _array),
        )
    },
    # Beside the weights in files of torchvision's and mmdetection's training scripts.
    **dict.fromkeys(
        (
            "argparse.Namespace",
            "builtins.getattr",  # how mmengine's buffer refers to its own methods
            "mmengine.logging.history_buffer.HistoryBuffer",
            "mmengine.config.config.ConfigDict",
            "mmcv.utils.config.ConfigDict",
        ),
        Record,
    ),
}


def load_safely(path: str) -> object:
    """What ``path`` holds, which is what torch.save or pickle.dump was given.

    Arrays come back as tensors, other objects than numbers, texts and containers as ``Record``.

    Raises:
        InputError: the file is cut off, is something else, or would run code.
        OSError: it cannot be opened.
    """
    with PathManager.open(path, "rb") as file:
        return _load(file, path)


def _load(file: IO[bytes], path: str) -> object:
    try:
        is_torch = file.read(15).startswith(TORCH_BEGINNINGS)
        file.seek(0)
        return _tensors(_load_torch(file) if is_torch else _Unpickler(file).load())
    except Refusal as error:
        raise InputError(
            f"{path} would call {error} to be read, so it was not read; if you trust its author, "
            f"keep its tensors alone: python tools/convert_weights.py --trust-pickle {path} OUT.pth"
        ) from error
    except READ_ERRORS as error:
        cause = one_line_cause(error).partition(". ")[0]
        raise InputError(
            f"{path} is no checkpoint that can be read ({cause}); copy it again, or save "
            "its tensors alone with torch.save(model.state_dict(), FILE)"
        ) from error


def load_trusted(path: str) -> object:
    """What ``path`` holds, by running whatever is in it: for files whose author is trusted."""
    with open(path, "rb") as file:
        is_torch = file.read(15).startswith(TORCH_BEGINNINGS)
        file.seek(0)
        if is_torch:
            return torch.load(file, map_location="cpu", weights_only=False)
        return pickle.load(file, encoding="latin1")


class Refusal(pickle.UnpicklingError):
    """The name of something that no file may call."""


class _Unpickler(pickle.Unpickler):
    """See "Restricting Globals" in the documentation of pickle."""

    def __init__(self, file):
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> object:
        path = f"{module.replace('__builtin__', 'builtins')}.{name}"  # of Python 2
        if path not in ALLOWED:
            raise Refusal(path)
        return ALLOWED[path]


def _load_torch(file: IO[bytes]) -> object:
    allowed = [(value, name) for name, value in ALLOWED.items() if name != "_codecs.encode"]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|got (<class.+>)", str(error))
        if called:
            raise Refusal(next(filter(None, called.groups()))) from error
        raise


def _tensors(value: object) -> object:
    """``value`` with every Array in it as a tensor; dicts and lists stay the objects they are."""
    if isinstance(value, Array):
        return value.tensor()
    if isinstance(value, tuple):
        return tuple(map(_tensors, value))
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _tensors(item)
    return value
