"""Atomic writes: files are written under a temporary name, flushed and renamed.

If saving a checkpoint is interrupted (by kill -9, a full disk, a power failure), the previous
checkpoint and ``last_checkpoint``, which names it, stay intact.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import nn

from ..errors import InputError, one_line_cause

PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Opens a binary file that is renamed to ``path`` when the block ends without an exception.

    Readers see either the old or the new content, even after a power failure.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    """Flushes a folder to disk, including the renames in it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicSaving:
    """Atomic saving for subclasses of fvcore's Checkpointer; must precede it among the bases.

    A ``save_dir`` like "s3://..." is as atomic as its PathManager handler. All methods raise an
    InputError if a file cannot be written; the previous checkpoint then stays intact.
    """

    def save(self, name: str, **extra) -> None:
        """Saves model and checkpointables as ``<save_dir>/<name>.pth``."""
        if self.save_dir and self.save_to_disk:
            states = {key: thing.state_dict() for key, thing in self.checkpointables.items()}
            self._write(name, {"model": self.model.state_dict(), **states, **extra})
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Saves only the weights of ``model``, which is not enough to resume from."""
        if self.save_dir and self.save_to_disk:
            self._write(name, {"model": model.state_dict()})

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes ``last_checkpoint`` name the checkpoint that --resume continues from."""
        with self._saving("last_checkpoint") as file:
            file.write(last_filename_basename.encode())

    def _write(self, name: str, content: dict) -> None:
        for left_behind in Path(self.save_dir).glob(f"*{PARTIAL}"):
            left_behind.unlink(missing_ok=True)  # left by a process that was killed while writing
        self.logger.info(f"Saving checkpoint to {self.save_dir}/{name}.pth")
        with self._saving(f"{name}.pth") as file:
            torch.save(content, file)

    @contextlib.contextmanager
    def _saving(self, file_name: str) -> Iterator[IO[bytes]]:
        path = os.path.join(self.save_dir, file_name)
        is_remote = "://" in self.save_dir
        try:
            with self.path_manager.open(path, "wb") if is_remote else atomic_write(path) as file:
                yield file
        except (OSError, RuntimeError) as error:
            kept = self.get_checkpoint_file()
            kept = f"{kept} is intact" if kept else "there is no earlier checkpoint"
            raise InputError(
                f"cannot save {path}: {_reason(error)}; {kept}; free some space or set OUTPUT_DIR, "
                "and continue with --resume"
            ) from error


def _reason(error: BaseException) -> str:
    """Returns the operating system's error message from the chain of exceptions."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return one_line_cause(error)
