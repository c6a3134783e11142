"""Reads files of weights without running what may be in them.

A pickle is a program. This runs those whose only calls build tensors, arrays and a few plain
records, and refuses all others before they have done anything. It is looked through before it is
run, because some exhaust memory or crash Python without a single call.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import re
import zipfile
from _codecs import encode
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..errors import InputError, one_line_cause, shown

# The first bytes of what torch.save writes: a zip file, or before 1.6 its pickled magic number.
TORCH_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
DEEPEST = 100  # tuples in a tuple; those of a checkpoint are at most a few


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
        for program, count in _programs(file) if is_torch else ((file, 1),):
            program.seek(0)
            for _ in range(count):
                _check_program(program)
        file.seek(0)
        return _tensors(_load_torch(file) if is_torch else _Unpickler(file).load())
    except Refusal as error:
        raise InputError(
            f"{path} would call {shown(str(error))} to be read, so it was not read; if you trust "
            "its author, keep its tensors alone: python tools/convert_weights.py --trust-pickle "
            f"{path} OUT.pth"
        ) from error
    except Exception as error:  # what a broken file makes of torch and pickle has many names
        cause = one_line_cause(error).partition(". ")[0]
        raise InputError(
            f"{path} is no checkpoint that can be read ({shown(cause)}); copy it again, or save "
            "its tensors alone with torch.save(model.state_dict(), FILE)"
        ) from error


def _programs(file: IO[bytes]) -> Iterator[tuple[IO[bytes], int]]:
    """Where the pickles in a file of torch.save begin, and how many there are one after another."""
    file.seek(0)
    if not zipfile.is_zipfile(file):
        yield file, 5  # a magic number, a version, the system, what was saved, names of storages
        return
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, as torch.save never does")
    file.seek(0)
    yield io.BytesIO(torch._C.PyTorchFileReader(file).get_record("data.pkl")), 1


def _check_program(file: IO[bytes]) -> None:
    """Reads one pickle without running it.

    Follows how deep tuples lie in each other, because the hash of a tuple is a recursion in C that
    nothing limits, and which slots of the memo are used, because pickle makes room for all slots up
    to the highest.

    Raises:
        ValueError: tuples lie too deep in each other, or a slot is out of proportion.
        LookupError, TypeError: it is no pickle.
    """
    depths: list[int | None] = []  # of what is on the stack; None for a mark
    memo: dict[int, int] = {}
    count, name = 0, ""
    while name != "STOP":
        count += 1
        operation = pickletools.code2op[file.read(1).decode("latin1")]
        name = operation.name
        # Python 2 wrote bytes beyond ASCII here, which pickletools does not expect.
        read = file.readline if name == "STRING" else operation.arg and operation.arg.reader
        argument = read and (read() if name == "STRING" else read(file))
        if name.endswith("PUT") or name == "MEMOIZE":
            slot = len(memo) if name == "MEMOIZE" else argument
            if slot > count:
                raise ValueError(f"slot {slot} of its memo is used after {count} instructions")
            memo[slot] = depths[-1]
        elif name.endswith("GET"):
            depths.append(memo[argument])
        elif name == "MARK":
            depths.append(None)
        else:
            depth = max(_pop(operation, depths), default=0) + name.startswith("TUPLE")
            if depth > DEEPEST:
                raise ValueError(f"more than {DEEPEST} tuples lie in each other")
            depths += [depth] * len(operation.stack_after)


def _pop(operation: pickletools.OpcodeInfo, stack: list) -> list:
    """Takes from the stack what ``operation`` takes."""
    taken, before = [], operation.stack_before
    fixed = len(before)
    if pickletools.markobject in before:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        fixed = before.index(pickletools.markobject)
    return taken + [stack.pop() for _ in range(fixed)]


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


def _tensors(value: object, done: dict[int, object] | None = None) -> object:
    """``value`` with every Array in it as a tensor; dicts and lists stay the objects they are."""
    done = {} if done is None else done  # what lies in several places is looked at once
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value
    if isinstance(value, Array):
        done[id(value)] = value.tensor()
    elif isinstance(value, tuple):
        done[id(value)] = tuple(_tensors(item, done) for item in value)
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _tensors(item, done)
    return done[id(value)]
