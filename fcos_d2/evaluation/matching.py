"""Detections against ground truth by the rules of COCO, with everything kept that AP averages away.

pycocotools decides what matches; this only takes its answers apart. N images, K classes.
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

from ..data.records import boxes_of, is_flat

SIZES = ("all", "small", "medium", "large")  # areas below 32 x 32, below 96 x 96, and above
COCO_DETECTIONS = 100  # per image and class, which AP counts


class Objects(NamedTuple):
    """Ground truth or detections of one image."""

    boxes: np.ndarray  # [n, 4], xyxy in pixels of the image file
    classes: np.ndarray  # int [n]
    scores: np.ndarray | None = None  # [n], of detections
    crowd: np.ndarray | None = None  # bool [n], of ground truth

    @classmethod
    def of(cls, found: Instances) -> Objects:
        """The detections of a detectron2 model."""
        found = found.to("cpu")
        boxes = found.pred_boxes.tensor.float().numpy()
        return cls(boxes, found.pred_classes.numpy(), found.scores.float().numpy())

    def above(self, limits: np.ndarray | float) -> Objects:
        """The detections that score at least ``limits``, of each or of all."""
        keep = self.scores >= limits
        return Objects(self.boxes[keep], self.classes[keep], self.scores[keep])


class ImageMatches(NamedTuple):
    """Which detection of an image found which object, at an IoU of 0.5."""

    found: np.ndarray  # int [n] per detection: object, -1 for a false positive
    ignored: np.ndarray  # bool [n] per detection: in a crowd
    missed: np.ndarray  # bool [m] per object; never a crowd


class Curve(NamedTuple):
    """The detections of one class by falling score, at an IoU of 0.5."""

    scores: np.ndarray  # [n]
    correct: np.ndarray  # bool [n]
    num_objects: int


class Matches(NamedTuple):
    """What was found and what was not, at an IoU of 0.5."""

    images: list[ImageMatches]
    curves: list[Curve]  # of K classes


class Evaluation(NamedTuple):
    """Average precision by class and size, and what it was computed from."""

    precision: np.ndarray  # [10 IoUs, 101 recalls, K, 4 sizes] in 0 to 1; -1 without any object
    precision_of_all: np.ndarray  # the same with more than the best 100 detections, if there are
    most: int  # detections of an image
    images: list[ImageMatches]
    curves: list[Curve]  # of K classes

    def average_of_all(self) -> float:
        """``average`` that counts all detections of an image, not just the best 100."""
        return self._replace(precision=self.precision_of_all).average()

    def average(self, iou: int | None = None, class_: int | None = None, size: int = 0) -> float:
        """Average precision in percent; not a number where there is no object.

        Args:
            iou: 0 for IoU 0.5, 5 for 0.75; the mean over all ten where None.
            class_: the mean over all classes where None.
            size: index into SIZES.
        """
        part = self.precision[:, :, :, size] if iou is None else self.precision[[iou], :, :, size]
        part = part if class_ is None else part[:, :, class_]
        part = part[part > -1]
        return float(100 * part.mean()) if part.size else float("nan")


def ground_truth(record: Mapping) -> Objects:
    """The annotations of a record in detectron2's form; those without area are crowds."""
    annotations = record.get("annotations", ())
    return Objects(
        boxes_of(annotations),
        np.array([a["category_id"] for a in annotations], dtype=int),
        crowd=np.array([a.get("iscrowd", 0) or is_flat(a) for a in annotations], dtype=bool),
    )


def evaluate_boxes(
    truth: Sequence[Objects], found: Sequence[Objects], num_classes: int
) -> Evaluation:
    """Compares the detections of N images with their ground truth.

    Args:
        truth: N, without scores.
        found: N, with scores.
        num_classes: K.

    Raises:
        ValueError: another number of images in one than in the other.
    """
    evaluation = _evaluation(truth, found, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision, most = evaluation.eval["precision"], evaluation.params.maxDets[-1]
    matches = _matches(evaluation, truth, found)
    return Evaluation(precision[..., 0], precision[..., -1], most, *matches)


def match_boxes(truth: Sequence[Objects], found: Sequence[Objects], num_classes: int) -> Matches:
    """``evaluate_boxes`` without average precision: for a single IoU, in a fraction of the time."""
    evaluation = _evaluation(truth, found, num_classes)
    evaluation.params.iouThrs = evaluation.params.iouThrs[:1]
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return _matches(evaluation, truth, found)


def _evaluation(truth: Sequence[Objects], found: Sequence[Objects], num_classes: int) -> COCOeval:
    if len(truth) != len(found):
        raise ValueError(
            f"evaluate_boxes: expected as many images, got {len(truth)} of truth and {len(found)} "
            "of found"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(truth, num_classes), _coco(found, num_classes), "bbox")
    most = max((len(image.boxes) for image in found), default=0)
    evaluation.params.maxDets = sorted({COCO_DETECTIONS, max(COCO_DETECTIONS, most)})
    evaluation.params.imgIds = list(range(len(truth)))
    evaluation.params.catIds = list(range(1, num_classes + 1))
    return evaluation


def _matches(evaluation: COCOeval, truth: Sequence[Objects], found: Sequence[Objects]) -> Matches:
    sizes = [(len(t.boxes), len(f.boxes)) for t, f in zip(truth, found, strict=True)]
    images = [ImageMatches(np.full(n, -1), np.ones(n, bool), np.zeros(m, bool)) for m, n in sizes]
    step = len(evaluation.params.areaRng) * len(truth)
    # By class, area and image; the first area is "all", the first IoU 0.5.
    starts = range(0, len(evaluation.evalImgs), step)
    entries = (evaluation.evalImgs[start : start + len(truth)] for start in starts)
    return Matches(images, [_read_class(evaluation, part, images) for part in entries])


def _read_class(evaluation: COCOeval, entries: Sequence, images: Sequence[ImageMatches]) -> Curve:
    """The curve of one class; writes its matches into ``images``."""
    places, objects = evaluation.cocoDt.anns, evaluation.cocoGt.anns
    scores, correct, num_objects = [np.zeros(0)], [np.zeros(0, bool)], 0
    for entry in filter(None, entries):
        image, ignored = images[entry["image_id"]], entry["dtIgnore"][0].astype(bool)
        matched = [objects[i]["place"] if i else -1 for i in entry["dtMatches"][0].astype(int)]
        real = ~np.asarray(entry["gtIgnore"], bool)
        missed = real & (entry["gtMatches"][0] == 0)
        rows = [places[i]["place"] for i in entry["dtIds"]]
        image.found[rows], image.ignored[rows] = matched, ignored
        image.missed[[objects[entry["gtIds"][i]]["place"] for i in np.flatnonzero(missed)]] = True
        scores.append(np.array(entry["dtScores"], float)[~ignored])
        correct.append(np.array(matched, int)[~ignored] >= 0)
        num_objects += int(real.sum())
    scores, correct = np.concatenate(scores), np.concatenate(correct)
    order = np.argsort(-scores, kind="stable")
    return Curve(scores[order], correct[order], num_objects)


def _coco(images: Sequence[Objects], num_classes: int) -> COCO:
    """An index of pycocotools. Ids of annotations count within their image, from 1 (0 is none)."""
    annotations = []
    for number, (boxes, classes, scores, crowd) in enumerate(images):
        scores = np.zeros(len(boxes)) if scores is None else scores
        crowd = np.zeros(len(boxes), bool) if crowd is None else crowd
        columns = (np.asarray(part).tolist() for part in (boxes, classes, scores, crowd))
        for i, ((x0, y0, x1, y1), class_, score, ignored) in enumerate(zip(*columns, strict=True)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "place": i,
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
