#!/usr/bin/env python
"""Trains and evaluates FCOS, with the flags of detectron2's train_net.py.

python train_net.py --config-file configs/digits/fcos_R_18_FPN_digits.yaml
python train_net.py --config-file FILE --eval-only MODEL.WEIGHTS output/digits/model_final.pth
python train_net.py --config-file FILE --num-gpus 8 SOLVER.BASE_LR 0.02 OUTPUT_DIR output/mine
torchrun --nproc-per-node 2 train_net.py --config-file FILE OUTPUT_DIR output/mine
"""

import sys

from fcos_d2.commands.train import main as invoke_main
from fcos_d2.commands.train import train as main

__all__ = ["invoke_main", "main"]

if __name__ == "__main__":
    sys.exit(invoke_main())
