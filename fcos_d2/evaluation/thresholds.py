"""From which score to believe a detection: per class, where F1 was best in an evaluation.

One number for all classes costs precision in some and recall in others. The thresholds are measured
whenever a model is evaluated and lie beside its weights, for ``fcos-d2`` to use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data import class_names, load_dataset
from ..errors import InputError
from .matching import COCO_DETECTIONS, Curve, Objects, evaluate_boxes, ground_truth, match_boxes

THRESHOLD_FILE = "score_thresholds.json"
DEFAULT = 0.5  # for a class without any object, or a model that was never evaluated


class Threshold(NamedTuple):
    """The best score to cut one class at, and what it reaches there; all in 0 to 1."""

    score: float
    f1: float
    precision: float
    recall: float


class Thresholds(NamedTuple):
    """Those of all classes of a model."""

    class_names: list[str]
    scores: list[float]


def best_threshold(curve: Curve) -> Threshold:
    """Where F1 is best; the highest such score. Detections of that very score are kept.

    A class without objects, or of which nothing was found, keeps ``DEFAULT``.
    """
    scores, correct, num_objects = curve
    # Detections of one score are kept or dropped together.
    ends = np.flatnonzero(np.append(scores[:-1] != scores[1:], True)[: len(scores)])
    if not num_objects or not correct.any():
        return Threshold(DEFAULT, 0.0, 0.0, 0.0)
    hits = np.cumsum(correct)[ends]
    f1 = 2 * hits / (ends + 1 + num_objects)
    best = int(f1.argmax())
    kept = ends[best] + 1
    values = scores[ends[best]], f1[best], hits[best] / kept, hits[best] / num_objects
    return Threshold(*map(float, values))


def f1_score(curves: Sequence[Curve], scores: Sequence[float]) -> float:
    """F1, 0 to 1, of classes cut at their ``scores``; the mean over those that have objects."""
    values = []
    for curve, score in zip(curves, scores, strict=True):
        kept = curve.scores >= score
        if curve.num_objects:
            values.append(2 * curve.correct[kept].sum() / (kept.sum() + curve.num_objects))
    return float(np.mean(values)) if values else 0.0


def write_thresholds(
    path: str | os.PathLike, names: Sequence[str], thresholds: Sequence[Threshold], dataset: str
) -> None:
    """Writes the thresholds of all classes, with what they reached, as JSON."""
    keys = ("threshold", "f1", "precision", "recall")
    classes = [
        {"name": name, **dict(zip(keys, threshold, strict=True))}
        for name, threshold in zip(names, thresholds, strict=True)
    ]
    content = {"measured_on": dataset, "iou": 0.5, "classes": classes}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def read_thresholds(path: str | os.PathLike) -> Thresholds:
    """What ``write_thresholds`` has written.

    Raises:
        InputError: it cannot be read or is something else.
    """
    try:
        classes = json.loads(Path(path).read_text())["classes"]
        names = [str(entry["name"]) for entry in classes]
        scores = [float(entry["threshold"]) for entry in classes]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no score thresholds ({error}); evaluate the model again with "
            "train_net.py --eval-only"
        ) from error
    return Thresholds(names, scores)


class ThresholdEvaluator(DatasetEvaluator):
    """Measures the best thresholds of a dataset and writes them into ``output_dir``.

    Its results are ``{"best_f1": {"F1", "F1_at_0.5"}}`` in percent: with the best threshold of each
    class, and with 0.5 for all. Where images have more than the 100 detections that COCO's AP
    counts, N at most, ``{"bbox_of_N": {"AP"}}`` counts all of them.
    """

    def __init__(self, dataset_name: str, output_dir: str):
        self._dataset_name, self._output_dir = dataset_name, output_dir
        self._found: dict[object, Objects] = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._found = {}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Takes the detections of a batch."""
        for given, output in zip(inputs, outputs, strict=True):
            if "instances" in output:  # a proposal generator alone has others
                self._found[given["image_id"]] = Objects.of(output["instances"])

    def evaluate(self) -> dict | None:
        """Results and file, in the main process; None in the others."""
        parts = comm.gather(self._found)
        if not comm.is_main_process():
            return None
        found = {key: value for part in parts for key, value in part.items()}
        records = load_dataset(self._dataset_name, filter_empty=False)
        names = class_names(self._dataset_name)
        if not names or not found or not any(record.get("annotations") for record in records):
            return {}
        records = [record for record in records if record["image_id"] in found]
        truth = [ground_truth(record) for record in records]
        detections = [found[record["image_id"]] for record in records]
        results, most = {}, max(len(image.boxes) for image in detections)
        if most > COCO_DETECTIONS:
            evaluation = evaluate_boxes(truth, detections, len(names))
            results[f"bbox_of_{most}"] = {"AP": evaluation.average_of_all()}
            curves = evaluation.curves
        else:
            curves = match_boxes(truth, detections, len(names)).curves
        best = [best_threshold(curve) for curve in curves]
        write_thresholds(Path(self._output_dir, THRESHOLD_FILE), names, best, self._dataset_name)
        f1 = [
            f1_score(curves, scores) for scores in ([t.score for t in best], [DEFAULT] * len(best))
        ]
        return {"best_f1": {"F1": 100 * f1[0], "F1_at_0.5": 100 * f1[1]}, **results}
