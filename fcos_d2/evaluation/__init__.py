"""What an evaluation says beyond AP: what was found and missed, and from which score to believe."""

from .evaluators import evaluator_for
from .matching import (
    Evaluation,
    ImageMatches,
    Matches,
    Objects,
    evaluate_boxes,
    ground_truth,
    match_boxes,
)
from .thresholds import (
    THRESHOLD_FILE,
    ThresholdEvaluator,
    Thresholds,
    best_threshold,
    f1_score,
    read_thresholds,
    write_thresholds,
)

__all__ = [
    "THRESHOLD_FILE",
    "Evaluation",
    "ImageMatches",
    "Matches",
    "Objects",
    "ThresholdEvaluator",
    "Thresholds",
    "best_threshold",
    "evaluate_boxes",
    "evaluator_for",
    "f1_score",
    "ground_truth",
    "match_boxes",
    "read_thresholds",
    "write_thresholds",
]
