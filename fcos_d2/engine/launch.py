"""Runs a script's main function in one or more processes, and determines its exit status."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from detectron2.engine import launch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import InputError, one_line_cause
from ..modeling.acceleration import keep_freed_memory
from .distributed import init_torchrun, is_torchrun
from .hooks import Preempted


def run_script(main: Callable, args) -> int:
    """Runs ``main(args)`` on ``args.num_gpus`` GPUs; returns the exit status of the script.

    Under torchrun, this process joins the group that torchrun started (with gloo if there is no
    GPU), and ``args.num_gpus`` is ignored.

    0: success. 1 (by SystemExit): TEST.EXPECTED_RESULTS not met. 2: InputError, printed in one
    line. 75: stopped by SIGTERM, after saving everything that --resume needs. 130: interrupted.
    """
    keep_freed_memory()
    try:
        if is_torchrun():
            init_torchrun()
            main(args)
            dist.destroy_process_group()  # after an error, torchrun kills those that wait
        else:
            _launch(main, args)
    except InputError as error:
        return _exit(2, f"error: {one_line_cause(error)}")
    except ProcessRaisedException as error:
        cause = one_line_cause(error)
        marker = f"{InputError.__module__}.{InputError.__name__}: "
        if not cause.startswith(marker):
            raise
        return _exit(2, f"error: {cause.removeprefix(marker)}")
    except (Preempted, ProcessExitedException) as error:
        if getattr(error, "exit_code", Preempted.STATUS) != Preempted.STATUS:
            raise
        saved = "stopped by SIGTERM; everything is saved, --resume continues"
        return _exit(Preempted.STATUS, saved)
    except KeyboardInterrupt:
        return _exit(130, "interrupted; --resume continues from the last checkpoint")
    return 0


def _exit(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    return status


def _launch(main: Callable, args) -> None:
    found = torch.cuda.device_count()
    # Without a GPU, the default --num-gpus 1 means one process on the CPU.
    if args.num_gpus > max(found, 1):
        raise InputError(
            f"--num-gpus is {args.num_gpus}, but {found} {'GPU is' if found == 1 else 'GPUs are'} "
            f"available; pass --num-gpus {max(found, 1)}"
            + ("" if found else ", or start processes on the CPU with torchrun --nproc-per-node N")
        )
    machines = {"num_machines": args.num_machines, "machine_rank": args.machine_rank}
    with _sigterm_forwarded() if args.num_gpus > 1 else contextlib.nullcontext():
        launch(main, args.num_gpus, **machines, dist_url=args.dist_url, args=(args,))


@contextlib.contextmanager
def _sigterm_forwarded() -> Iterator[None]:
    """Forwards SIGTERM to the training processes, which this one waits for."""

    def forward(number: int, frame: object) -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
