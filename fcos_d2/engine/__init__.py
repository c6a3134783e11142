"""Training and evaluation with detectron2's trainers: no loop of its own.

What a user got wrong leaves this package as an InputError; ``run_script`` prints it as one line.
"""

from . import downloads  # noqa: F401  (registers how URLs are opened)
from .checkpoint import Checkpointer
from .evaluators import evaluator_for
from .hooks import AssignmentStatistics, TrainingPanels
from .lazy import is_lazy, run_lazy
from .script import run_script
from .setup import choose_device, read_cfg, setup_cfg
from .train_loader import TrainLoader
from .trainer import Trainer, evaluate, load_detector

__all__ = [
    "AssignmentStatistics",
    "Checkpointer",
    "TrainLoader",
    "Trainer",
    "TrainingPanels",
    "choose_device",
    "evaluate",
    "evaluator_for",
    "is_lazy",
    "load_detector",
    "read_cfg",
    "run_lazy",
    "run_script",
    "setup_cfg",
]
