"""Training and evaluation with detectron2's trainers: no loop of its own.

What a user got wrong leaves this package as an InputError; ``run_script`` prints it as one line.
"""

from .hooks import AssignmentStatistics, TrainingPanels
from .launch import run_script
from .lazy import is_lazy, run_lazy
from .loader import TrainLoader
from .setup import setup_cfg
from .trainer import Trainer

__all__ = [
    "AssignmentStatistics",
    "TrainLoader",
    "Trainer",
    "TrainingPanels",
    "is_lazy",
    "run_lazy",
    "run_script",
    "setup_cfg",
]
