"""Score thresholds: for each class, the score with the best F1 in an evaluation.

A single threshold for all classes costs precision in some and recall in others. Every evaluation
measures the thresholds and saves them next to the weights, where ``fcos-d2`` finds them.
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
DEFAULT_THRESHOLD = 0.5  # of classes without objects


class Threshold(NamedTuple):
    """The best score threshold of a class, and its F1, precision and recall; all in [0, 1]."""

    score: float
    f1: float
    precision: float
    recall: float


class Thresholds(NamedTuple):
    """Score thresholds of all classes."""

    class_names: list[str]
    scores: list[float]


def best_threshold(curve: Curve) -> Threshold:
    """Returns the highest score threshold with the best F1; detections with that score are kept.

    It is ``DEFAULT_THRESHOLD`` for a class without objects or correct detections.
    """
    scores, correct, num_objects = curve
    # Detections with equal scores are kept or dropped together.
    ends = np.flatnonzero(np.append(scores[:-1] != scores[1:], True)[: len(scores)])
    if not num_objects or not correct.any():
        return Threshold(DEFAULT_THRESHOLD, 0.0, 0.0, 0.0)
    hits = np.cumsum(correct)[ends]
    f1 = 2 * hits / (ends + 1 + num_objects)
    best = int(f1.argmax())
    kept = ends[best] + 1
    values = scores[ends[best]], f1[best], hits[best] / kept, hits[best] / num_objects
    return Threshold(*map(float, values))


def f1_score(curves: Sequence[Curve], thresholds: Sequence[float]) -> float:
    """Returns the mean F1, in [0, 1], of the classes that have objects."""
    values = []
    for curve, threshold in zip(curves, thresholds, strict=True):
        kept = curve.scores >= threshold
        if curve.num_objects:
            values.append(2 * curve.correct[kept].sum() / (kept.sum() + curve.num_objects))
    return float(np.mean(values)) if values else 0.0


def write_thresholds(
    path: str | os.PathLike, names: Sequence[str], thresholds: Sequence[Threshold], dataset: str
) -> None:
    """Writes the thresholds of all classes, with their F1, precision and recall, as JSON."""
    keys = ("threshold", "f1", "precision", "recall")
    classes = [
        {"name": name, **dict(zip(keys, threshold, strict=True))}
        for name, threshold in zip(names, thresholds, strict=True)
    ]
    content = {"measured_on": dataset, "iou": 0.5, "classes": classes}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def read_thresholds(path: str | os.PathLike) -> Thresholds:
    """Reads a file of ``write_thresholds``.

    Raises:
        InputError: the file cannot be read or has another format.
    """
    try:
        classes = json.loads(Path(path).read_text())["classes"]
        names = [str(entry["name"]) for entry in classes]
        scores = [float(entry["threshold"]) for entry in classes]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} has no score thresholds ({error}); evaluate the model again with "
            "train_net.py --eval-only"
        ) from error
    return Thresholds(names, scores)


class ThresholdEvaluator(DatasetEvaluator):
    """Measures the best thresholds on a dataset and writes them to ``output_dir``.

    Its results are ``{"best_f1": {"F1", "F1_at_0.5"}}`` in percent: with the best threshold of each
    class, and with 0.5 for all. If images have up to N detections, more than the 100 that COCO's AP
    counts, ``{"bbox_of_N": {"AP"}}`` is the AP of all of them.
    """

    def __init__(self, dataset_name: str, output_dir: str):
        self._dataset_name, self._output_dir = dataset_name, output_dir
        self._found: dict[object, Objects] = {}

    def reset(self) -> None:
        """Drops all detections."""
        self._found = {}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Stores the detections of a batch."""
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" in output:  # a proposal generator returns "proposals"
                self._found[image["image_id"]] = Objects.from_instances(output["instances"])

    def evaluate(self) -> dict | None:
        """Writes the file and returns the results in the main process; returns None in others."""
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
        f1 = 100 * f1_score(curves, [threshold.score for threshold in best])
        fixed = 100 * f1_score(curves, [DEFAULT_THRESHOLD] * len(best))
        return {"best_f1": {"F1": f1, "F1_at_0.5": fixed}, **results}
