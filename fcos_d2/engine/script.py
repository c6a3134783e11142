"""Running a script's main function on as many GPUs as asked for, and its exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from detectron2.engine import launch

from ..errors import InputError, one_line_cause


def run_script(main: Callable, args) -> int:
    """Runs ``main(args)`` on as many GPUs as ``args`` says; the exit status of the script.

    0: done. 1 (by SystemExit): TEST.EXPECTED_RESULTS not met. 2: InputError, printed in one line.
    130: interrupted.
    """
    try:
        _check_gpus(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except InputError as error:
        print(f"error: {one_line_cause(error)}", file=sys.stderr)
        return 2
    except torch.multiprocessing.ProcessRaisedException as error:
        cause = one_line_cause(error)
        marker = f"{InputError.__module__}.{InputError.__name__}: "
        if not cause.startswith(marker):
            raise
        print(f"error: {cause.removeprefix(marker)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _check_gpus(args) -> None:
    found = torch.cuda.device_count()
    # One process without a GPU is what the default of --num-gpus means on a machine without any.
    if args.num_gpus > max(found, 1):
        raise InputError(
            f"--num-gpus is {args.num_gpus}, but {found} {'GPU is' if found == 1 else 'GPUs are'} "
            f"there; pass --num-gpus {max(found, 1)}{'' if found else ', which runs on the CPU'}"
        )
