"""Checks the outcome of every input."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fcos_d2 import InputError

LONGEST = 1000  # characters of an error message
ACTIONS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.putenv", "socket.connect"),
    *("shutil.rmtree", "shutil.copyfile", "ctypes.dlopen", "webbrowser.open"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_watching = False


class Forbidden(BaseException):
    """Raised for forbidden actions; a BaseException, so that exception handlers do not hide it."""


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    if event in ACTIONS or (event == "open" and (arguments[2] or 0) & WRITING):
        raise Forbidden(f"{event}{arguments}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def only_reading() -> Iterator[None]:
    """Fails if the block starts a process, opens a connection or changes a file."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


@contextlib.contextmanager
def result_or_refusal(*names: str) -> Iterator[None]:
    """Accepts an InputError if it is one readable line that contains one of ``names``."""
    try:
        yield
    except InputError as error:
        message = str(error)
        assert any(name in message for name in names), f"no name in: {message[:LONGEST]}"
        assert message.isprintable(), f"not one readable line: {message[:LONGEST]!r}"
        assert len(message) <= LONGEST, f"{len(message)} characters: {message[:LONGEST]}"


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    # In memory if possible, because disks are slower than the checks.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="fcos_d2_fuzz_", dir=memory)


def scratch(name: str) -> Path:
    """Returns the path of a temporary file, which is deleted when the process exits."""
    return Path(_scratch().name, name)
