"""Files that are complete or not there at all: written under another name, flushed, renamed.

Whatever happens while a checkpoint is written (kill -9, a full disk, a power cut), the previous one
and ``last_checkpoint``, which names it, are as they were.
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
    """A binary file that takes the name ``path`` when the block ends without an exception.

    Readers see the old content or the new one, and after a power cut one of the two as well.
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
    """A rename is on the disk when its folder is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicSaving:
    """Saving for a subclass of fvcore's Checkpointer, to be named before it among the bases.

    A ``save_dir`` that only a handler of PathManager can reach ("s3://...") is as atomic as that
    handler. All methods raise an InputError where a file cannot be written; the previous checkpoint
    is untouched then.
    """

    def save(self, name: str, **extra) -> None:
        """Saves model and checkpointables as ``<save_dir>/<name>.pth``."""
        if self.save_dir and self.save_to_disk:
            states = {key: thing.state_dict() for key, thing in self.checkpointables.items()}
            self._write(name, {"model": self.model.state_dict(), **states, **extra})
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Saves the weights of ``model`` alone, not as a checkpoint to resume from."""
        if self.save_dir and self.save_to_disk:
            self._write(name, {"model": model.state_dict()})

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes ``last_checkpoint`` name the checkpoint from which --resume continues."""
        with self._saving("last_checkpoint") as file:
            file.write(last_filename_basename.encode())

    def _write(self, name: str, content: dict) -> None:
        for left_behind in Path(self.save_dir).glob(f"*{PARTIAL}"):
            left_behind.unlink(missing_ok=True)  # of a process that was killed while it wrote
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
                f"cannot save {path}: {_reason(error)}; {kept}; make room or set OUTPUT_DIR, and "
                "continue with --resume"
            ) from error


def _reason(error: BaseException) -> str:
    """What the operating system said, wherever in the chain of exceptions."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return one_line_cause(error)
