"""Trains and evaluates FCOS, with the flags of Detectron2's train_net.py.

python train_net.py --config-file configs/digits/fcos_R_18_FPN_digits.yaml
python train_net.py --config-file FILE --eval-only MODEL.WEIGHTS output/digits/model_final.pth
python train_net.py --config-file FILE --num-gpus 8 SOLVER.BASE_LR 0.02 OUTPUT_DIR output/mine
torchrun --nproc-per-node 2 train_net.py --config-file FILE OUTPUT_DIR output/mine
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..config_file import find_config
from ..engine import Trainer, run_lazy, run_script, setup_cfg
from ..inference import evaluate
from ..lazy_config import is_lazy


def train(args: argparse.Namespace):
    """Trains, or with --eval-only evaluates; returns the results of the last evaluation."""
    args.config_file = find_config(args.config_file)
    if is_lazy(args.config_file):
        return run_lazy(args)
    cfg = setup_cfg(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    results = evaluate(cfg, resume=args.resume)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line with detectron2's parser."""
    return default_argument_parser(epilog=__doc__).parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_script(train, parse(arguments))
