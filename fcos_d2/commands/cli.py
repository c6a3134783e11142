"""Trains and runs FCOS detectors.

    fcos-d2 photo.jpg                          detect objects (see fcos-d2 predict --help)
    fcos-d2 new-config FOLDER -o FILE          write a config for a folder of images and labels
    fcos-d2 check --config-file FILE           check datasets before training
    fcos-d2 visualize --config-file FILE       draw datasets and the points assigned to each object
    fcos-d2 train --config-file FILE           train, like python train_net.py
    fcos-d2 eval --config-file FILE            evaluate, like python train_net.py --eval-only
    fcos-d2 report OUTPUT_DIR                  draw the results of a training run
    fcos-d2 export --config-file FILE          export a detector for other runtimes
    fcos-d2 convert IN OUT                     convert weights from or to other implementations
    fcos-d2 benchmark --config-file FILE       measure training and inference, part by part
    fcos-d2 analyze --config-file FILE         count parameters and multiply-adds

Run a command with --help for its options. --config-file also takes the name of a config in the
model zoo, such as torchvision/fcos_R_50_FPN.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Module of each command, with flags that select the command in the module.
COMMANDS = {
    "predict": ["predict"],
    "new-config": ["new_config"],
    "check": ["visualize", "--check"],
    "visualize": ["visualize"],
    "train": ["train"],
    "eval": ["train", "--eval-only"],
    "report": ["report"],
    "export": ["export"],
    "convert": ["convert"],
    "benchmark": ["benchmark"],
    "analyze": ["analyze"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that ``arguments`` names; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    name = words.pop(0) if words[0] in COMMANDS else "predict"
    sys.argv[0] = f"fcos-d2 {name}"  # the program name in argparse's messages
    module, *flags = COMMANDS[name]
    return importlib.import_module(f"fcos_d2.commands.{module}").main([*flags, *words])
