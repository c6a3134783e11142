"""Pickles of weights, run without running what may be in them.

A pickle is a program. The only calls of those that run here build what stands for tensors, arrays
and a few plain records: one that asks for more is refused before it has done anything. Each is
looked through right before it is run, because some exhaust memory, time or Python's stack without a
single call. torch.load is not used even for its own files: the calls that it allows allocate
whatever the file says.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import sys
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import format_value

MOST_ARGUMENTS = 20  # of one call, and dimensions of a tensor; those of a checkpoint are a few
ORDERS = ("<", ">", "=", "|")  # of the bytes of a number; the last for one byte
# Of the keys of dicts and the items of sets:
LARGEST_KEY = 2**64  # of numbers: of larger ones the hash takes time
LONGEST_KEY = 10_000  # of texts, in characters: to compare longer ones takes time
SMALL_KEY = 2**16  # of numbers that can be as many as one likes
MOST_CHOSEN_KEYS = 1000  # in one pickle, of those whose hashes a file can choose to be the same


# ---- What a file may name ----


class Fixed:
    """Something that a file may name or call, but not change."""

    def __setstate__(self, state):
        raise ValueError("it changes what is not its own")


class Function(Fixed):
    """A function that a file may call."""

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):  # noqa: D102
        return self.call(*args)


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

    def __init__(self, pairs: list | None = None):
        super().__init__()
        if pairs is None:
            return
        for key, value in pairs:  # as Python 2 wrote them
            if not isinstance(key, str) or len(key) > LONGEST_KEY:
                raise ValueError("a key of an OrderedDict is no text, or a long one")
            self[key] = value
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
            raise ValueError(f"arrays of dtype {format_value(self._code, quote=True)} are not read")
        return np.dtype(self._code).newbyteorder(self._order.replace("|", "="))


class Array:
    """In place of a numpy array, whose own unpickling trusts the file."""

    _state = (1, (0,), DType("u1"), False, b"")

    def __init__(self, axes: tuple | None = None):
        self._axes = axes  # as they lie in the bytes, where they have another order

    def __setstate__(self, state):
        self._state = state

    def tensor(self, budget: Budget) -> Tensor:
        """The array's numbers, copied."""
        _, shape, dtype, fortran, data = self._state
        budget.take(len(data))
        value = _numbers(data, dtype).reshape(shape, order="F" if fortran else "C")
        value = value if self._axes is None else value.transpose(self._axes)
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

# None gives a tuple that may hold anything: _check_program takes what they give for a key.


def _latin1(text: str, codec: str) -> str:
    """Leaves bytes the text that old protocols write them as: encoded often, it would be many."""
    if codec != "latin1" or not isinstance(text, str):
        raise ValueError(f"bytes are read from a text in latin1, not in {format_value(codec)}")
    return text


def _empty_array(kind: None, shape: tuple, dtype: str) -> Array:
    return Array()


def _array(data: bytes, dtype: DType, shape: tuple, order: str, axes=None) -> Array:
    array = Array(axes if order == "K" else None)
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
    makes_tensor = isinstance(function, Function) and function.call in MAKE_TENSOR
    if not makes_tensor or not isinstance(args, tuple) or len(args) > MOST_ARGUMENTS:
        raise ValueError("a tensor with attributes is not made as torch.save has it")
    return function(*args)


def _parameter(tensor: View, grad: bool, hooks: object, state: object = None) -> View:
    if not isinstance(tensor, View):
        raise ValueError("a parameter is no tensor")
    return tensor


def _size(numbers: tuple) -> tuple:
    is_short = isinstance(numbers, tuple) and len(numbers) <= MOST_ARGUMENTS
    if not is_short or not all(_is_number(number, LARGEST_KEY) for number in numbers):
        raise ValueError("a size is not of a few numbers")
    return numbers


def _counts(counts: dict) -> dict:
    if not isinstance(counts, dict):
        raise ValueError("a Counter is not of a dict")
    return counts


def _set(items: list) -> set | list:
    """A set of texts and small numbers; others stay a list."""
    own = items.copy()
    items.clear()  # see Dict
    return set(own) if all(map(_is_simple, own)) else own


def _is_simple(item: object) -> bool:
    is_text = isinstance(item, (str, bytes)) and len(item) <= LONGEST_KEY
    return is_text or _is_number(item, SMALL_KEY)


def _is_number(value: object, largest: int) -> bool:
    return isinstance(value, int) and abs(value) <= largest


def _complex(*parts: object) -> complex | Record:
    is_number = len(parts) == 2 and all(isinstance(part, float) for part in parts)
    return complex(*parts) if is_number else Record()


def _device(kind: object, *index: object) -> torch.device | Record:
    """The device; none for a number, for which torch would look at the machine's."""
    if not isinstance(kind, str) or len(kind) > 20 or not all(_is_number(i, 127) for i in index):
        return Record()
    try:
        return torch.device(kind, *index)
    except RuntimeError:  # of another torch
        return Record()


MAKE_TENSOR = (_tensor, _tensor_of_dtype)
# Quantized numbers are none without what a tensor of them has besides; with those of less than a
# byte, torch can do next to nothing.
DTYPES = [
    value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not re.match(r"q|bits|float4|u?int[1-7]$", name)
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
    "builtins.set": Function(_set),
    "builtins.complex": Function(_complex),
    "torch.device": Function(_device),
    "torch.Size": Function(_size),  # their tuple and dict will do
    "collections.Counter": Function(_counts),
    # Beside the weights, as in files of torchvision's and mmdetection's training scripts.
    **dict.fromkeys(
        (
            *("builtins.bytearray", "argparse.Namespace"),
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
            raise ValueError(f"storage {format_value(key)} has two sizes")
        return View(storage, dtype)


class _Item(NamedTuple):
    """What an object on the stack will be, as far as it is known before the program is run."""

    length: int | None  # of a tuple; None of what is none
    cost: float  # as a key: 1 if a file can choose its hash, otherwise 0; infinite for no key


FREE = _Item(None, 0)
CHOSEN = _Item(None, 1)
NO_KEY = _Item(None, math.inf)
# What has to be hashed, of the objects that an instruction takes from the stack, last one first.
HASHED = dict.fromkeys(("SETITEM", "SETITEMS", "DICT"), slice(1, None, 2))
HASHED |= {"ADDITEMS": slice(-1), "FROZENSET": slice(None)}
CALLS = ("REDUCE", "NEWOBJ", "BINPERSID")
OTHER_CALLS = ("OBJ", "INST", "NEWOBJ_EX")  # of what Python 2 or nothing in ALLOWED is written as
# What leaves the object that lay deepest, of those that it takes, where it was.
CHANGES = ("BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "DUP")


def _check_program(file: IO[bytes]) -> None:
    """Looks through the pickle that comes next in ``file`` without running it.

    Refused is what costs more than a file of its size should:

    - keys of dicts that are long, or tuples of other than texts and numbers: the hash of a tuple
      is a recursion in C that nothing limits, and takes exponential time where tuples lie in each
      other twice;
    - many keys whose hashes are not random: they can be chosen to be the same, so that each is
      compared to all others;
    - a call with many arguments, which a few bytes can repeat;
    - a slot of the memo far beyond the others: pickle makes room for all up to the highest.

    Raises:
        ValueError: it is refused, or is no pickle.
    """
    stack: list[_Item | None] = []  # None for a mark
    memo: dict[int, _Item | None] = {}
    count, cost, name = 0, 0, ""
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
                _check_call(name, taken)
                cost += sum(item.cost for item in taken[HASHED.get(name, slice(0))])
                _check_cost(cost)
                if operation.stack_after:
                    small = max(SMALL_KEY, count)  # as many as the file can have cost no more
                    item = _result(name, argument, taken, small)
                    stack += [item] * len(operation.stack_after)
    except LookupError as error:
        raise ValueError("its instructions are cut off or do not fit together") from error


def _instruction(file: IO[bytes]) -> tuple[pickletools.OpcodeInfo, object]:
    """Reads one instruction and its argument."""
    operation = pickletools.code2op[file.read(1).decode("latin1")]
    if operation.name == "STRING":  # Python 2 wrote any bytes here, pickletools expects ASCII
        return operation, file.readline()
    return operation, operation.arg and operation.arg.reader(file)


def _pop(operation: pickletools.OpcodeInfo, stack: list[_Item | None]) -> list[_Item]:
    """Takes from the stack what ``operation`` takes, last one first.

    Raises:
        LookupError: it is not there.
    """
    taken, before = [], operation.stack_before
    fixed = len(before)
    if pickletools.markobject in before:
        while (item := stack.pop()) is not None:
            taken.append(item)
        fixed = before.index(pickletools.markobject)
    taken += [stack.pop() for _ in range(fixed)]
    if None in taken:
        raise LookupError("a mark instead of an object")
    return taken


def _check_call(name: str, taken: list[_Item]) -> None:
    if name in OTHER_CALLS:
        raise ValueError(f"it makes an object by {name}, as neither torch.save nor numpy does")
    if name in CALLS and taken[0].length is None:
        raise ValueError("the arguments of a call are no tuple")
    if name in CALLS and taken[0].length > MOST_ARGUMENTS:
        raise ValueError(f"a call has more than {MOST_ARGUMENTS} arguments")


def _check_cost(cost: float) -> None:
    if cost == math.inf:
        raise ValueError("a key of a dict is a tuple of other than texts and numbers, or too long")
    if cost > MOST_CHOSEN_KEYS:
        raise ValueError(f"more than {MOST_CHOSEN_KEYS} keys of dicts are tuples or large numbers")


def _result(name: str, argument: object, taken: list[_Item], small: int) -> _Item:
    """What an instruction puts on the stack; ``small`` is up to where numbers are free as keys."""
    if name in CHANGES:
        return taken[-1]
    if name.endswith(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")):
        is_flat = all(item.length is None and item.cost <= 1 for item in taken)
        return _Item(len(taken), 1 if is_flat and len(taken) <= MOST_ARGUMENTS else math.inf)
    if name in ("NONE", "NEWTRUE", "NEWFALSE", "STACK_GLOBAL"):
        return FREE
    if isinstance(argument, (str, bytes)):
        return FREE if len(argument) <= LONGEST_KEY else NO_KEY
    if _is_number(argument, small):
        return FREE
    is_number = isinstance(argument, float) or _is_number(argument, LARGEST_KEY)
    return CHOSEN if is_number or name in CALLS else NO_KEY
