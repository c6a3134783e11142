"""Evaluators of datasets, matches between detections and ground truth, and score thresholds."""

from .evaluators import evaluator_for
from .matching import Objects, evaluate_boxes, ground_truth
from .thresholds import THRESHOLD_FILE, ThresholdEvaluator, read_thresholds

__all__ = [
    "THRESHOLD_FILE",
    "Objects",
    "ThresholdEvaluator",
    "evaluate_boxes",
    "evaluator_for",
    "ground_truth",
    "read_thresholds",
]
