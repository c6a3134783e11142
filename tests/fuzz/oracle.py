"""What every outcome has to be, whatever the input was."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fcos_d2 import InputError

LONGEST = 1000  # characters of a message that a person reads
DOING = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.putenv", "socket.connect"),
    *("shutil.rmtree", "shutil.copyfile", "ctypes.dlopen", "webbrowser.open"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_watching = False


class Forbidden(BaseException):
    """Input made the program do something; no handler of exceptions may hide that."""


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    if event in DOING or (event == "open" and (arguments[2] or 0) & WRITING):
        raise Forbidden(f"{event}{arguments}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def only_reading() -> Iterator[None]:
    """Fails if a process is started, a connection opened or a file changed inside."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


@contextlib.contextmanager
def result_or_refusal(*names: str) -> Iterator[None]:
    """Lets an InputError pass that is one readable line with one of ``names`` in it."""
    try:
        yield
    except InputError as error:
        message = str(error)
        assert any(name in message for name in names), f"not named: {message[:LONGEST]}"
        assert message.isprintable(), f"not one readable line: {message[:LONGEST]!r}"
        assert len(message) <= LONGEST, f"{len(message)} characters: {message[:LONGEST]}"


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory:
    # In memory where the system has such a folder: a disk takes longer than the check.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="fcos_d2_fuzz_", dir=memory)


def scratch(name: str) -> Path:
    """A path for a file of this process, removed when it ends."""
    return Path(_scratch().name, name)
