"""Matches detections with ground truth by the rules of COCO, using pycocotools.

N images, K classes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from detectron2.structures import Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.records import is_flat, xyxy_boxes

SIZES = ("all", "small", "medium", "large")  # areas below 32 x 32, below 96 x 96, and above
COCO_DETECTIONS = 100  # per image and class that count for AP


class Objects(NamedTuple):
    """Ground truth or detections of one image."""

    boxes: np.ndarray  # [n, 4], xyxy in pixels of the image file
    classes: np.ndarray  # int [n]
    scores: np.ndarray | None = None  # [n], of detections
    crowd: np.ndarray | None = None  # bool [n], of ground truth

    @classmethod
    def from_instances(cls, instances: Instances) -> Objects:
        """Returns the detections of a detectron2 model."""
        instances = instances.to("cpu")
        boxes = instances.pred_boxes.tensor.float().numpy()
        return cls(boxes, instances.pred_classes.numpy(), instances.scores.float().numpy())

    def above(self, thresholds: np.ndarray | float) -> Objects:
        """Returns the detections with scores of at least their ``thresholds``."""
        keep = self.scores >= thresholds
        return Objects(self.boxes[keep], self.classes[keep], self.scores[keep])


class ImageMatches(NamedTuple):
    """Matches of n detections and m objects of one image at an IoU of 0.5."""

    matched: np.ndarray  # int [n]: index of the matched object, or -1
    ignored: np.ndarray  # bool [n]: whether the detection matches a crowd
    missed: np.ndarray  # bool [m]: whether the object, which is no crowd, has no match


class Curve(NamedTuple):
    """Detections of one class by descending score, matched at an IoU of 0.5."""

    scores: np.ndarray  # [n]
    correct: np.ndarray  # bool [n]
    num_objects: int


class Matches(NamedTuple):
    """Matches of all images at an IoU of 0.5."""

    images: list[ImageMatches]
    curves: list[Curve]  # [K]


class Evaluation(NamedTuple):
    """Precision of each class and size, and the matches it was computed from."""

    precision: np.ndarray  # [10 IoUs, 101 recalls, K, 4 sizes] in [0, 1]; -1 without objects
    precision_of_all: np.ndarray  # the same for all detections instead of the best 100
    max_detections: int  # largest number of detections in an image
    images: list[ImageMatches]
    curves: list[Curve]  # [K]

    def average_of_all(self) -> float:
        """Returns ``average`` for all detections of an image instead of the best 100."""
        return self._replace(precision=self.precision_of_all).average()

    def average(self, iou: int | None = None, class_: int | None = None, size: int = 0) -> float:
        """Returns the average precision in percent; NaN if there are no objects.

        Args:
            iou: index of the IoU, such as 0 for 0.5 or 5 for 0.75; None for the mean of all ten.
            class_: index of the class; None for the mean of all classes.
            size: index into SIZES.
        """
        part = self.precision[:, :, :, size] if iou is None else self.precision[[iou], :, :, size]
        part = part if class_ is None else part[:, :, class_]
        part = part[part > -1]
        return float(100 * part.mean()) if part.size else float("nan")


def ground_truth(record: Mapping) -> Objects:
    """Returns the annotations of a record in detectron2's format; boxes without area are crowds."""
    annotations = record.get("annotations", ())
    return Objects(
        xyxy_boxes(annotations),
        np.array([a["category_id"] for a in annotations], dtype=int),
        crowd=np.array([a.get("iscrowd", 0) or is_flat(a) for a in annotations], dtype=bool),
    )


def evaluate_boxes(
    truth: Sequence[Objects], found: Sequence[Objects], num_classes: int
) -> Evaluation:
    """Evaluates the detections of N images.

    Args:
        truth: ground truth of N images.
        found: detections in N images.
        num_classes: K.

    Raises:
        ValueError: ``truth`` and ``found`` have different lengths.
    """
    evaluation = _make_coco_eval(truth, found, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision, max_detections = evaluation.eval["precision"], evaluation.params.maxDets[-1]
    matches = _matches(evaluation, truth, found)
    return Evaluation(precision[..., 0], precision[..., -1], max_detections, *matches)


def match_boxes(truth: Sequence[Objects], found: Sequence[Objects], num_classes: int) -> Matches:
    """Matches like ``evaluate_boxes``, but only at one IoU, in a fraction of the time."""
    evaluation = _make_coco_eval(truth, found, num_classes)
    evaluation.params.iouThrs = evaluation.params.iouThrs[:1]
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return _matches(evaluation, truth, found)


def _make_coco_eval(
    truth: Sequence[Objects], found: Sequence[Objects], num_classes: int
) -> COCOeval:
    if len(truth) != len(found):
        raise ValueError(
            "evaluate_boxes: truth and found must have the same number of images, got "
            f"{len(truth)} and {len(found)}"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_to_coco(truth, num_classes), _to_coco(found, num_classes), "bbox")
    most = max((len(image.boxes) for image in found), default=0)
    evaluation.params.maxDets = sorted({COCO_DETECTIONS, max(COCO_DETECTIONS, most)})
    evaluation.params.imgIds = list(range(len(truth)))
    evaluation.params.catIds = list(range(1, num_classes + 1))
    return evaluation


def _matches(evaluation: COCOeval, truth: Sequence[Objects], found: Sequence[Objects]) -> Matches:
    sizes = [(len(t.boxes), len(f.boxes)) for t, f in zip(truth, found, strict=True)]
    images = [ImageMatches(np.full(n, -1), np.ones(n, bool), np.zeros(m, bool)) for m, n in sizes]
    step = len(evaluation.params.areaRng) * len(truth)
    # Entries are ordered by class, area and image. The first area is "all", the first IoU 0.5.
    starts = range(0, len(evaluation.evalImgs), step)
    entries = (evaluation.evalImgs[start : start + len(truth)] for start in starts)
    return Matches(images, [_read_class(evaluation, part, images) for part in entries])


def _read_class(evaluation: COCOeval, entries: Sequence, images: Sequence[ImageMatches]) -> Curve:
    """Returns the curve of one class, and writes its matches to ``images``."""
    detections, objects = evaluation.cocoDt.anns, evaluation.cocoGt.anns
    scores, correct, num_objects = [np.zeros(0)], [np.zeros(0, bool)], 0
    for entry in filter(None, entries):
        image, ignored = images[entry["image_id"]], entry["dtIgnore"][0].astype(bool)
        matched = [objects[i]["index"] if i else -1 for i in entry["dtMatches"][0].astype(int)]
        real = ~np.asarray(entry["gtIgnore"], bool)
        missed = real & (entry["gtMatches"][0] == 0)
        rows = [detections[i]["index"] for i in entry["dtIds"]]
        image.matched[rows], image.ignored[rows] = matched, ignored
        image.missed[[objects[entry["gtIds"][i]]["index"] for i in np.flatnonzero(missed)]] = True
        scores.append(np.array(entry["dtScores"], float)[~ignored])
        correct.append(np.array(matched, int)[~ignored] >= 0)
        num_objects += int(real.sum())
    scores, correct = np.concatenate(scores), np.concatenate(correct)
    order = np.argsort(-scores, kind="stable")
    return Curve(scores[order], correct[order], num_objects)


def _to_coco(images: Sequence[Objects], num_classes: int) -> COCO:
    """Converts objects to a COCO dataset; "index" is the index of an annotation in its image."""
    annotations = []
    for number, (boxes, classes, scores, crowd) in enumerate(images):
        scores = np.zeros(len(boxes)) if scores is None else scores
        crowd = np.zeros(len(boxes), bool) if crowd is None else crowd
        columns = (np.asarray(part).tolist() for part in (boxes, classes, scores, crowd))
        for i, ((x0, y0, x1, y1), class_, score, ignored) in enumerate(zip(*columns, strict=True)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "index": i,
                    "image_id": number,
                    "category_id": class_ + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(ignored),
                    "score": score,
                }
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": i} for i in range(1, num_classes + 1)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
