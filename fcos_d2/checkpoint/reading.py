"""Reads files of weights without running what may be in them (pickles.py).

They are plain pickles, or what torch.save wrote: a zip file, or before torch 1.6 pickles in a row.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from typing import IO

import torch
from detectron2.utils.file_io import PathManager

from ..errors import InputError, format_value, one_line_cause
from .pickles import Array, Budget, Refusal, Storage, View, run

# How the files of torch.save begin: as a zip file, or with a pickled magic number.
ZIP = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C


def load_safely(path: str) -> object:
    """What ``path`` holds, which is what torch.save or pickle.dump was given.

    Texts, numbers, lists, dicts and devices come back as what they are. Something else comes of:

    - arrays: tensors; numbers of numpy: those of Python;
    - OrderedDict, Counter: dicts; torch.Size: a tuple;
    - a set of other than texts and small numbers: a list, where the protocol is below 4;
    - bytes, where the protocol is below 3: text;
    - what an object has besides, such as the attributes of a tensor: nothing;
    - other objects, of the few classes that are known: ``Record``.

    Raises:
        InputError: the file is cut off, is something else, or would run code.
        OSError: it cannot be opened.
    """
    with PathManager.open(path, "rb") as file:
        return _load(file, path)


def _load(file: IO[bytes], path: str) -> object:
    try:
        return _read(file)
    except Refusal as error:
        raise InputError(
            f"{path} would call {format_value(str(error))} to be read, so it was not read; if you "
            "trust its author, keep its tensors alone: "
            f"python tools/convert_weights.py --trust-pickle {path} OUT.pth"
        ) from error
    except Exception as error:  # what a broken file makes of pickle and torch has many names
        cause = one_line_cause(error).partition(". ")[0]
        raise InputError(
            f"{path} is no checkpoint that can be read ({format_value(cause)}); copy it again, or "
            "save its tensors alone with torch.save(model.state_dict(), FILE)"
        ) from error


def _read(file: IO[bytes]) -> object:
    start = file.read(len(ZIP))
    budget = Budget(file.seek(0, os.SEEK_END))
    file.seek(0)
    content = _read_zip(file, budget) if start == ZIP else run(file)
    if content == MAGIC and start != ZIP:
        content = _read_legacy(file, budget)
    return _tensors(content, budget, {})


def _read_zip(file: IO[bytes], budget: Budget) -> object:
    archive = _Archive(file)
    if "constants.pkl" in archive:
        raise ValueError("it is a TorchScript program")
    storages: dict[str, Storage] = {}
    content = run(io.BytesIO(archive.read("data.pkl")), storages)
    order = archive.read("byteorder") if "byteorder" in archive else b"little"
    for key, storage in storages.items():
        if archive.find(f"data/{key}") != storage.size:
            raise ValueError(f"storage {format_value(key)} is not of {storage.size} bytes")
        budget.take(storage.size)
        storage.fill(file)
        if order != sys.byteorder.encode():
            storage.bytes.untyped_storage().byteswap(storage.dtype)
    return content


class _Archive:
    """The records of a zip file that torch.save wrote; they lie in it as they are."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        with zipfile.ZipFile(file) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
        self._folder = next(iter(self._entries), "").partition("/")[0]

    def __contains__(self, name: str) -> bool:
        return f"{self._folder}/{name}" in self._entries

    def find(self, name: str) -> int:
        """Goes to the bytes of a record; how many they are."""
        if name not in self:
            raise ValueError(f"it has no {format_value(name)}")
        entry = self._entries[f"{self._folder}/{name}"]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed, as torch.save never does")
        # Not by zipfile, because torch.save can be told to leave out the sums that it checks.
        self._file.seek(entry.header_offset + 26)
        self._file.seek(sum(struct.unpack("<HH", self._file.read(4))), os.SEEK_CUR)
        return entry.file_size

    def read(self, name: str) -> bytes:
        """The bytes of a record."""
        return self._file.read(self.find(name))


def _read_legacy(file: IO[bytes], budget: Budget) -> object:
    """What follows the magic number."""
    run(file)  # the version of the format
    run(file)  # the system
    storages: dict[str, Storage] = {}
    content = run(file, storages)
    for key in run(file):
        storage = storages.pop(key, None) if isinstance(key, str) else None
        if storage is None or file.read(8) != struct.pack("<q", storage.count):
            raise ValueError(
                f"storage {format_value(key, quote=True)} is not of the numbers that tensors have"
            )
        budget.take(storage.size)
        storage.fill(file)
    if storages:
        raise ValueError(f"it has no storage {format_value(next(iter(storages)))}")
    return content


def _tensors(value: object, budget: Budget, done: dict[int, object]) -> object:
    """``value`` with every Array and View in it as a tensor; dicts and lists stay what they are."""
    # Ids will do: all that is looked at is there from the start, so no two objects share one.
    if not isinstance(value, (Array, View, tuple, list, dict)):
        return value
    if id(value) not in done:  # what lies in several places is looked at once
        done[id(value)] = value
        if isinstance(value, (Array, View)):
            done[id(value)] = value.tensor(budget)
        elif isinstance(value, tuple):
            done[id(value)] = tuple(_tensors(item, budget, done) for item in value)
        else:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                value[key] = _tensors(item, budget, done)
    return done[id(value)]


def load_trusted(path: str) -> object:
    """What ``path`` holds, by running whatever is in it: for files whose author is trusted."""
    with open(path, "rb") as file:
        start = file.read(40)
        is_torch = start.startswith(ZIP) or MAGIC.to_bytes(10, "little") in start
        file.seek(0)
        if is_torch:
            return torch.load(file, map_location="cpu", weights_only=False)
        return pickle.load(file, encoding="latin1")
