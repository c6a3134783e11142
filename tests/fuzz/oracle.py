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

MAX_LENGTH = 1000  # characters of an error message
FORBIDDEN = (  # audit events
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.putenv", "socket.connect"),
    *("shutil.rmtree", "shutil.copyfile", "ctypes.dlopen", "webbrowser.open"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_is_active = False


class ForbiddenAction(BaseException):
    """Raised for forbidden actions; a BaseException, so that exception handlers do not hide it."""


def _audit(event: str, arguments: tuple) -> None:
    if not _is_active:
        return
    if event in FORBIDDEN or (event == "open" and (arguments[2] or 0) & WRITING):
        raise ForbiddenAction(f"{event}{arguments}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def forbid_side_effects() -> Iterator[None]:
    """Fails if the block starts a process, opens a connection or changes a file."""
    global _is_active
    _is_active = True
    try:
        yield
    finally:
        _is_active = False


@contextlib.contextmanager
def allow_input_error(*names: str) -> Iterator[None]:
    """Accepts an InputError if it is one readable line that contains one of ``names``."""
    try:
        yield
    except InputError as error:
        message = str(error)
        assert any(name in message for name in names), f"no name in: {message[:MAX_LENGTH]}"
        assert message.isprintable(), f"not one readable line: {message[:MAX_LENGTH]!r}"
        assert len(message) <= MAX_LENGTH, f"{len(message)} characters: {message[:MAX_LENGTH]}"


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    # In memory if possible, because disks are slower than the checks.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="fcos_d2_fuzz_", dir=memory)


def scratch(name: str) -> Path:
    """Returns the path of a temporary file, which is deleted when the process exits."""
    return Path(_scratch().name, name)
