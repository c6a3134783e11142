"""Sets up a training run: config, loggers, seeds, signals and error handling."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import takewhile

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import TrainerBase, default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from tqdm.contrib.logging import logging_redirect_tqdm

from ..checkpoint import Checkpointer
from ..config_file import choose_device, read_cfg
from ..data import prepare
from ..errors import InputError
from .hooks import CheckpointHook

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOGGERS = ("detectron2", "fvcore", "fcos_d2")

logger = logging.getLogger(__name__)


def setup_cfg(args) -> CfgNode:
    """Returns the frozen config of a run, and sets up its loggers and random seeds.

    Args:
        args: from ``default_argument_parser().parse_args()``; ``args.config_file`` overrides the
            defaults, and the KEY VALUE pairs in ``args.opts`` override both.

    Raises:
        InputError: a file, key, value or dataset name is invalid.
    """
    cfg = read_cfg(args.config_file, args.opts)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog:
            prepare(name)  # raises the error
    notice = choose_device(cfg)
    cfg.freeze()
    try:
        if cfg.OUTPUT_DIR:
            PathManager.mkdirs(cfg.OUTPUT_DIR)
    except OSError as error:
        raise InputError(
            f"cannot create OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}; set another OUTPUT_DIR"
        ) from error
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fcos_d2")
    if notice:
        logger.warning(notice)
    return cfg


@contextlib.contextmanager
def training_context(checkpoints: CheckpointHook) -> Iterator[None]:
    """Makes SIGTERM save and stop a training run, and keeps its log and progress bar apart.

    InputErrors, which ``run_script`` prints, stay out of the log; a full disk raises one.
    """

    def is_bug(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, InputError) and not _is_full_disk(error)

    loop = logging.getLogger("detectron2.engine.train_loop")  # logs the traceback of any error
    loop.addFilter(is_bug)
    on_terminal = map(logging.getLogger, LOGGERS if sys.stderr.isatty() else ())
    try:
        with checkpoints.handle_sigterm(), logging_redirect_tqdm(list(on_terminal)):
            yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise InputError(
            f"cannot write {error.filename or 'to the output folder'}: {error.strerror}; free some "
            "space or set OUTPUT_DIR, and continue with --resume"
        ) from error
    finally:
        loop.removeFilter(is_bug)


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def resume_or_load(trainer: TrainerBase, checkpointer: Checkpointer, weights: str, resume: bool):
    """Loads the last checkpoint if ``resume`` is set and there is one, or else ``weights``.

    Only ``weights`` may have other classes than the model. Returns the first iteration.
    """
    resume = resume and checkpointer.has_checkpoint()
    checkpointer.reset_class_layer = not resume
    checkpointer.resume_or_load(weights, resume=resume)
    if resume and comm.is_main_process():
        truncate_metrics(f"{checkpointer.save_dir}/metrics.json", trainer.iter + 1)
    return trainer.iter + 1 if resume else 0


def truncate_metrics(path: str, first: int) -> None:
    """Removes the lines that a run resumed at iteration ``first`` will write again."""

    def is_before(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["iteration"] < first
        except ValueError:  # truncated
            return False

    if os.path.isfile(path):
        with open(path, "r+b") as file:
            file.truncate(sum(map(len, takewhile(is_before, file))))


def flatten(tree: Mapping, prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to strings by dotted key."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {prefix + key: str(value)}
    return flat
