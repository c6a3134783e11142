"""Training with detectron2's loop, trainers and hooks.

Invalid user input raises InputErrors, which ``run_script`` prints.
"""

from .hooks import AssignmentStatistics, TrainingPanels
from .launch import run_script
from .lazy import run_lazy
from .loader import TrainLoader
from .setup import setup_cfg
from .trainer import Trainer

__all__ = [
    "AssignmentStatistics",
    "TrainLoader",
    "Trainer",
    "TrainingPanels",
    "run_lazy",
    "run_script",
    "setup_cfg",
]
