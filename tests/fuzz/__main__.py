"""Fuzzes one target: python -m tests.fuzz TARGET [--runs N]. Exits with 0 if nothing failed.

Inputs that fail are saved in the working corpus as crash-*, timeout-* or oom-*; copied to
tests/fuzz/corpus/TARGET/ under a descriptive name, they become tests.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from . import CORPUS, TARGETS, checker

SECONDS = 10  # time limit for an input
MEGABYTES = 4096  # memory limit for the process
MAX_BYTES = 4096  # of an input


def main() -> None:
    """Runs libFuzzer, which ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=-1, metavar="N", help="default: unlimited")
    parser.add_argument("--seed", type=int, default=0, help="default: random")
    parser.add_argument("--corpus", type=Path, help="working corpus; default: output/fuzz/TARGET")
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("error: fuzzing needs atheris; install it with: pip install -e '.[fuzz]'")
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    corpus = options.corpus or Path("output/fuzz", options.target)
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["fcos_d2", "tests.fuzz", "detectron2.checkpoint"]):
        check = checker(options.target)
    arguments = [
        *(f"-runs={options.runs}", f"-seed={options.seed}", f"-timeout={SECONDS}"),
        *(f"-rss_limit_mb={MEGABYTES}", f"-max_len={MAX_BYTES}"),
        *(f"-artifact_prefix={corpus}{os.sep}", "-print_final_stats=1"),
    ]
    seeds = CORPUS / options.target

    def run(data: bytes) -> None:
        try:
            check(data)
        except BaseException:  # libFuzzer may fail to save the input of an exception
            (corpus / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            raise

    atheris.Setup([sys.argv[0], *arguments, str(corpus), str(seeds)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
