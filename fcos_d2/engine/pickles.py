"""Pickles of weights, run without running what may be in them.

A pickle is a program. The only calls of those that run here build what stands for tensors, arrays
and a few plain records: one that asks for more is refused before it has done anything. Each is
looked through right before it is run, because some exhaust memory, time or Python's stack without a
single call. torch.load is not used even for its own files: the calls that it allows allocate
whatever the file says.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import sys
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..errors import quoted, shown

MOST_ARGUMENTS = 20  # of one call, and dimensions of a tensor; those of a checkpoint are a few
ORDERS = ("<", ">", "=", "|")  # of the bytes of a number; the last for one byte
LARGEST_KEY = 2**64  # of a dict, where it is a number: of larger ones many can share a hash


# ---- What a file may name ----


class Fixed:
    """Something that a file may name or call, but not change."""

    def __setstate__(self, state):
        raise ValueError("it changes what is not its own")


class Function(Fixed):
    """A function that a file may call."""

    def __init__(self, call):
        self._call = call

    def __call__(self, *args):  # noqa: D102
        return self._call(*args)


class Record:
    """In place of an object that accompanies weights and is not needed, whatever it holds."""

    def __new__(cls, *args):  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


class Dict(dict):
    """In place of an OrderedDict, whose attributes could take the places of its methods."""

    __slots__ = ()

    def __init__(self, pairs: list | tuple = ()):
        super().__init__()
        for key, value in pairs:  # as Python 2 wrote them
            if not isinstance(key, str):
                raise ValueError("a key of an OrderedDict is no text")
            self[key] = value
        if pairs:
            pairs.clear()  # a few bytes could have them copied again

    def __setstate__(self, state):
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
        is_text = isinstance(self._code, str)
        if not (is_text and re.fullmatch(r"[biufc]\d\d?", self._code)) or self._order not in ORDERS:
            raise ValueError(f"arrays of dtype {quoted(self._code)} are not read")
        return np.dtype(self._code).newbyteorder(self._order.replace("|", "="))


class Array:
    """In place of a numpy array, whose own unpickling trusts the file."""

    _state = (1, (0,), DType("u1"), False, b"")

    def __setstate__(self, state):
        self._state = state

    def tensor(self, budget: Budget) -> Tensor:
        """The array's numbers, copied."""
        _, shape, dtype, fortran, data = self._state
        budget.take(len(data))
        value = _numbers(data, dtype).reshape(shape, order="F" if fortran else "C")
        native = value.astype(value.dtype.newbyteorder("="))
        return torch.from_numpy(np.ascontiguousarray(native).reshape(value.shape))


class Storage(Fixed):
    """Numbers of one or more tensors, which lie in the file outside its pickle."""

    def __init__(self, dtype: torch.dtype, count: int):
        self.dtype, self.count, self.bytes = dtype, count, None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize

    def fill(self, file: IO[bytes]) -> None:
        """Reads the numbers, which come next in ``file``.

        Raises:
            ValueError: it ends before they do.
        """
        self.bytes = torch.empty(self.size, dtype=torch.uint8)
        if file.readinto(self.bytes.numpy()) != self.size:
            raise ValueError("it is cut off")


class View(Fixed):
    """In place of a tensor; without a shape, of all numbers of a storage."""

    def __init__(self, storage: Storage, dtype: torch.dtype, *shape_stride_offset):
        self.storage, self.dtype, self._place = storage, dtype, shape_stride_offset

    def tensor(self, budget: Budget) -> Tensor:
        """The tensor, which shares its numbers with all others of the same storage."""
        numbers = self.storage.bytes.view(self.dtype)
        return numbers.as_strided(*self._place) if self._place else numbers


class Budget:
    """Bytes that the numbers of a file may take: no more than the file has."""

    def __init__(self, size: int):
        self._left = size

    def take(self, count: int) -> None:
        """Takes ``count`` bytes.

        Raises:
            ValueError: there are not so many left.
        """
        self._left -= count
        if self._left < 0:
            raise ValueError("its tensors hold more bytes than the file")


def _numbers(data: bytes | str, dtype: DType) -> np.ndarray:
    # Bytes of old protocols are texts here; see _latin1.
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.numpy()) if data else np.empty(0, dtype.numpy())


# ---- What is called instead of what a file calls ----


def _latin1(text: str, codec: str) -> str:
    """Leaves bytes the text that old protocols write them as: encoded often, it would be many."""
    if codec != "latin1" or not isinstance(text, str):
        raise ValueError(f"bytes are read from a text in latin1, not in {shown(codec)}")
    return text


def _empty_array(kind: None, shape: tuple, dtype: str) -> Array:
    return Array()


def _array(data: bytes, dtype: DType, shape: tuple, order: str) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _number(dtype: DType, data: bytes | str) -> float:
    if len(data) != dtype.numpy().itemsize:
        raise ValueError(f"a number has {len(data)} bytes")
    return _numbers(data, dtype).item()


def _tensor(whole: View, offset, shape, stride, grad=False, hooks=None, metadata=None) -> View:
    if metadata:
        raise ValueError("a tensor is a conjugate or a negative of its numbers")
    if len(shape) > MOST_ARGUMENTS:
        raise ValueError(f"a tensor has {len(shape)} dimensions")
    return View(whole.storage, whole.dtype, tuple(shape), stride, offset)


def _tensor_of_dtype(whole: View, offset, shape, stride, grad, hooks, dtype, *metadata) -> View:
    return _tensor(View(whole.storage, dtype), offset, shape, stride, grad, hooks, *metadata)


def _tensor_with_attributes(function: Function, kind: None, args: tuple, state: object) -> View:
    return function(*args[:MOST_ARGUMENTS])


def _content(content: object) -> object:
    return content


def _parameter(tensor: View, grad: bool, hooks: object, state: object = None) -> View:
    return tensor


# Quantized numbers are none without what a tensor of them has besides.
DTYPES = [
    value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith("q")
]
# What a file may name, and what it gets.
ALLOWED: dict[str, object] = {
    "collections.OrderedDict": Dict,
    "_codecs.encode": Function(_latin1),  # how old protocols write bytes
    "builtins.bytes": Function(lambda: ""),  # and none of them
    "numpy.dtype": DType,
    "numpy.ndarray": None,  # named where arrays are made, not called
    **{
        f"numpy.{core}.{name}": Function(call)
        for core in ("core", "_core")  # before numpy 2, and since
        for name, call in (
            ("multiarray._reconstruct", _empty_array),
            ("multiarray.scalar", _number),
            ("numeric._frombuffer", _array),
        )
    },
    **{str(dtype): dtype for dtype in DTYPES},
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
    "torch._utils._rebuild_tensor": Function(_tensor),
    "torch._utils._rebuild_tensor_v2": Function(_tensor),
    "torch._utils._rebuild_tensor_v3": Function(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": Function(_parameter),
    "torch._utils._rebuild_parameter_with_state": Function(_parameter),
    "torch._tensor._rebuild_from_type_v2": Function(_tensor_with_attributes),
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter"), None),  # named for it
    # Their list, tuple and dict will do.
    **dict.fromkeys(("builtins.set", "torch.Size", "collections.Counter"), Function(_content)),
    # Beside the weights, as in files of torchvision's and mmdetection's training scripts.
    **dict.fromkeys(
        (
            *("torch.device", "builtins.complex", "builtins.bytearray", "argparse.Namespace"),
            "builtins.getattr",  # how mmengine's buffer refers to its own methods
            "mmengine.logging.history_buffer.HistoryBuffer",
            "mmengine.config.config.ConfigDict",
            "mmcv.utils.config.ConfigDict",
        ),
        Record,
    ),
}


# ---- Running one ----


def run(file: IO[bytes], storages: dict[str, Storage] | None = None) -> object:
    """Runs the pickle that comes next in ``file``, after a look through it.

    Args:
        file: at the beginning of the pickle; afterwards, at its end.
        storages: where to put the storages that it refers to, still to be filled. None for a
            pickle that has all its numbers in it.

    Returns:
        What was pickled, with Array or View in place of every array and tensor.

    Raises:
        Refusal: it names something that is not in ALLOWED.
        ValueError: it costs more than a file of its size should, or is no pickle.
        Exception: what pickle says of a broken one.
    """
    start = file.tell()
    _check_program(file)
    file.seek(start)
    return _Unpickler(file, storages).load()


class Refusal(pickle.UnpicklingError):
    """The name of something that no file may call."""


class _Unpickler(pickle.Unpickler):
    """See "Restricting Globals" and "Persistence of External Objects" in pickle's documentation.

    Storages that the program refers to are added to ``storages``, still to be filled.
    """

    def __init__(self, file: IO[bytes], storages: dict[str, Storage] | None):
        super().__init__(file, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> object:
        path = f"{module.replace('__builtin__', 'builtins')}.{name}"  # of Python 2
        if path not in ALLOWED:
            raise Refusal(path)
        return ALLOWED[path]

    def persistent_load(self, reference: tuple) -> View:
        if self._storages is None or not isinstance(reference, tuple):
            raise ValueError("it refers to numbers as torch.save does not")
        _, dtype, key, _, count, *part = reference
        kinds = isinstance(dtype, torch.dtype), isinstance(key, str), isinstance(count, int)
        if not all(kinds) or any(part) or not 0 <= count <= sys.maxsize:
            raise ValueError("it does not say which numbers it refers to")
        storage = self._storages.setdefault(key, Storage(dtype, count))
        if storage.size != count * dtype.itemsize:
            raise ValueError(f"storage {shown(key)} has two sizes")
        return View(storage, dtype)


# What has to be hashed, of the objects that an instruction takes from the stack, last one first.
HASHED = dict.fromkeys(("SETITEM", "SETITEMS", "DICT"), slice(1, None, 2))
HASHED |= dict.fromkeys(("ADDITEMS", "FROZENSET"), slice(None))
CALLS = ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "BINPERSID")


def _check_program(file: IO[bytes]) -> None:
    """Looks through the pickle that comes next in ``file`` without running it.

    Refused is what costs more than a file of its size should:

    - keys of dicts that are tuples, frozensets or long numbers: the hash of a tuple is a recursion
      in C that nothing limits, and takes exponential time where tuples lie in each other twice;
    - a call with many arguments, which a few bytes can repeat;
    - a slot of the memo far beyond the others: pickle makes room for all up to the highest.

    Raises:
        ValueError: it is refused, or is no pickle.
    """
    stack: list[int | None] = []  # of an object that is a tuple its length; None for a mark
    memo: dict[int, int | None] = {}
    count, name = 0, ""
    try:
        while name != "STOP":
            operation, argument = _instruction(file)
            count, name = count + 1, operation.name
            if name.endswith("PUT") or name == "MEMOIZE":
                slot = len(memo) if name == "MEMOIZE" else argument
                if slot > count:
                    raise ValueError(f"slot {slot} of its memo is used after {count} instructions")
                memo[slot] = stack[-1]
            elif name.endswith("GET"):
                stack.append(memo[argument])
            elif name == "MARK":
                stack.append(None)
            elif name == "POP":  # the only one that may take a mark for an object
                stack.pop()
            else:
                taken = _pop(operation, stack)
                _check_taken(name, taken)
                stack += [_length(name, argument, taken)] * len(operation.stack_after)
    except LookupError as error:
        raise ValueError("its instructions are cut off or do not fit together") from error


def _instruction(file: IO[bytes]) -> tuple[pickletools.OpcodeInfo, object]:
    """Reads one instruction and its argument."""
    operation = pickletools.code2op[file.read(1).decode("latin1")]
    if operation.name == "STRING":  # Python 2 wrote any bytes here, pickletools expects ASCII
        return operation, file.readline()
    return operation, operation.arg and operation.arg.reader(file)


def _pop(operation: pickletools.OpcodeInfo, stack: list[int | None]) -> list[int]:
    """Takes from the stack what ``operation`` takes, last one first.

    Raises:
        LookupError: it is not there.
    """
    taken, before = [], operation.stack_before
    fixed = len(before)
    if pickletools.markobject in before:
        while (length := stack.pop()) is not None:
            taken.append(length)
        fixed = before.index(pickletools.markobject)
    taken += [stack.pop() for _ in range(fixed)]
    if None in taken:
        raise LookupError("a mark instead of an object")
    return taken


def _check_taken(name: str, taken: list[int]) -> None:
    if any(taken[HASHED.get(name, slice(0))]):
        raise ValueError("a key of a dict is a tuple or a long number")
    if name in CALLS and max(taken) > MOST_ARGUMENTS:
        raise ValueError(f"a call has more than {MOST_ARGUMENTS} arguments")


def _length(name: str, argument: object, taken: list[int]) -> int:
    """The length of the tuple that an instruction puts on the stack, if it may be one."""
    if name.startswith("TUPLE") or name == "FROZENSET":
        return len(taken)
    if isinstance(argument, int) and abs(argument) > LARGEST_KEY:
        return 1  # no key either
    return max(taken, default=0)  # it may be what was taken
