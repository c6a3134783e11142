"""What an evaluation says beyond AP: what was found and missed, and from which score to believe."""

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
    best_thresholds,
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
    "best_thresholds",
    "evaluate_boxes",
    "f1_score",
    "ground_truth",
    "match_boxes",
    "read_thresholds",
    "write_thresholds",
]
