"""The console command ``fcos-d2``: detection, and by the name of a command everything else.

    fcos-d2 photo.jpg                          detect objects; fcos-d2 predict --help tells more
    fcos-d2 train --config-file FILE           train, as python train_net.py does
    fcos-d2 eval --config-file FILE            train_net.py --eval-only
    fcos-d2 report OUTPUT_DIR                  draw what a training run reached
    fcos-d2 export --config-file FILE          write a detector for other runtimes
    fcos-d2 benchmark --config-file FILE       measure training and inference, part by part
    fcos-d2 analyze --config-file FILE         count parameters and multiply-adds

Every command has a --help of its own. --config-file also takes the name of a config in the model
zoo, such as torchvision/fcos_R_50_FPN.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("predict", "train", "eval", "report", "export", "benchmark", "analyze")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    name = words.pop(0) if words[0] in COMMANDS else "predict"
    if name == "eval":
        name, words = "train", ["--eval-only", *words]
    sys.argv[0] = f"fcos-d2 {name}"  # what argparse calls the program
    return importlib.import_module(f"fcos_d2.commands.{name}").main(words)
