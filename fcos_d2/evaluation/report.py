"""Writes an HTML report of an evaluation: a folder with index.html and its images.

AP is computed from all detections, mistakes from those above the best threshold of their class, as
in ``fcos-d2``: a false positive is a detection without a matching object, a false negative an
object without a matching detection, at an IoU of 0.5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torchvision.ops import box_iou

from ..data.images import read_image
from ..visualization.boxes import class_color, draw_boxes
from ..visualization.curves import Series, plot_precision_recall, plot_training
from .matching import (
    COCO_DETECTIONS,
    SIZES,
    Evaluation,
    ImageMatches,
    Objects,
    evaluate_boxes,
    ground_truth,
    match_boxes,
)
from .thresholds import DEFAULT_THRESHOLD, Threshold, best_threshold, f1_score

CROP_SIDE = 260  # pixels, of the images on the page
CONTEXT = 1.0  # margin around a box, relative to its longer side
POOR_IOU = 0.1  # minimum IoU of a poor box; below, the box and the object are unrelated
WHITE, RED = (255, 255, 255), (213, 0, 0)


class Mistake(NamedTuple):
    """A false positive or false negative."""

    image: int  # index of the image
    box: np.ndarray  # xyxy
    class_: int
    score: float | None  # None for a false negative
    kind: str
    detail: str


def write_report(
    folder: Path,
    title: str,
    records: Sequence[Mapping],
    found: Sequence[Objects],
    class_names: Sequence[str],
    metrics: Mapping[str, Series] | None = None,
    max_mistakes: int = 24,
) -> Path:
    """Writes the page and its images.

    Args:
        folder: folder to write to; images of an earlier report are replaced.
        title: title of the page.
        records: N images with annotations in detectron2's format.
        found: detections in the N images.
        class_names: K names.
        metrics: metrics of the training run, from ``read_metrics``.
        max_mistakes: number of false positives and of false negatives to show.

    Returns:
        Path of the page, ``folder/index.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    truth = [ground_truth(record) for record in records]
    evaluation = evaluate_boxes(truth, found, len(class_names))
    best = [best_threshold(curve) for curve in evaluation.curves]
    plot_precision_recall(
        evaluation.precision[0, :, :, 0], class_names, folder / "precision_recall.png"
    )
    if metrics:
        plot_training(metrics, folder / "curves.png")
    page = _template().render(
        title=title,
        summary=_summary(evaluation, best, truth),
        sizes=_size_rows(evaluation, truth),
        classes=_class_rows(evaluation, best, class_names),
        galleries=list(
            _galleries(folder / "images", records, truth, found, best, class_names, max_mistakes)
        ),
        names=class_names,
        has_curves=bool(metrics),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _template():
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["percent"] = lambda v: "–" if math.isnan(v) else f"{v:.1f}"
    return environment.get_template("report.html")


# ---- Metrics ----


def _summary(
    evaluation: Evaluation, best: Sequence[Threshold], truth: Sequence[Objects]
) -> dict[str, str]:
    curves = evaluation.curves
    f1 = 100 * f1_score(curves, [t.score for t in best])
    fixed = 100 * f1_score(curves, [DEFAULT_THRESHOLD] * len(best))
    values = _averages(evaluation)
    if evaluation.max_detections > COCO_DETECTIONS:
        values[f"AP of {evaluation.max_detections} detections"] = evaluation.average_of_all()
    values |= {"F1": f1, f"F1 at {DEFAULT_THRESHOLD}": fixed}
    shown = {name: "–" if math.isnan(v) else f"{v:.1f}" for name, v in values.items()}
    objects = sum(curve.num_objects for curve in curves)
    return {"images": str(len(truth)), "objects": str(objects), **shown}


def _size_rows(evaluation: Evaluation, truth: Sequence[Objects]) -> list[dict]:
    boxes = np.concatenate([np.zeros((0, 4)), *(o.boxes[~o.crowd] for o in truth)])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    limits = [(0, math.inf), (0, 32**2), (32**2, 96**2), (96**2, math.inf)]
    ranges = ["", ": below 32 × 32 pixels", ": up to 96 × 96 pixels", ": above 96 × 96 pixels"]
    rows = []
    for size, (low, high) in enumerate(limits):
        count = int(((areas >= low) & (areas < high)).sum())
        row = {"name": SIZES[size] + ranges[size], "count": count}
        rows.append(row | _averages(evaluation, size=size))
    return rows


def _class_rows(evaluation: Evaluation, best: Sequence[Threshold], names) -> list[dict]:
    rows = []
    for class_, (name, threshold) in enumerate(zip(names, best, strict=True)):
        row = {"name": name, "count": evaluation.curves[class_].num_objects}
        row |= _averages(evaluation, class_=class_)
        row |= {key: 100 * getattr(threshold, key) for key in ("f1", "precision", "recall")}
        row["color"] = "#{:02x}{:02x}{:02x}".format(*class_color(class_))
        rows.append(row | {"threshold": f"{threshold.score:.2f}"})
    return rows


def _averages(evaluation: Evaluation, **part: int) -> dict[str, float]:
    ious = {"AP": None, "AP50": 0, "AP75": 5}
    return {name: evaluation.average(iou, **part) for name, iou in ious.items()}


# ---- Mistakes ----


def false_positives(
    truth: Sequence[Objects],
    found: Sequence[Objects],
    matches: Sequence[ImageMatches],
    names: Sequence[str],
) -> list[Mistake]:
    """Returns the detections without a matching object, by descending score."""
    mistakes = []
    for image, (objects, detections, match) in enumerate(zip(truth, found, matches, strict=True)):
        for i in np.flatnonzero((match.matched < 0) & ~match.ignored):
            box, class_ = detections.boxes[i], detections.classes[i]
            kind, detail = _explain_false_positive(box, class_, objects, names)
            mistakes.append(Mistake(image, box, class_, detections.scores[i], kind, detail))
    return sorted(mistakes, key=lambda m: -m.score)


def _explain_false_positive(box: np.ndarray, class_: int, objects: Objects, names):
    """Returns the kind of mistake and its details."""
    ious = box_ious(box, objects.boxes)
    same, other = ious * (objects.classes == class_), ious * (objects.classes != class_)
    if same.max(initial=0) >= 0.5:
        return "duplicate", "another detection matches the object"
    if other.max(initial=0) >= 0.5:
        return "wrong class", f"the object is {names[objects.classes[int(other.argmax())]]}"
    if same.max(initial=0) >= POOR_IOU:
        return "poor box", f"IoU {same.max():.2f}"
    return "background", "no object of this class"


def false_negatives(
    truth: Sequence[Objects],
    kept: Sequence[Objects],
    found: Sequence[Objects],
    matches: Sequence[ImageMatches],
    names: Sequence[str],
) -> list[Mistake]:
    """Returns the objects without a match among the ``kept`` detections, by descending area."""
    mistakes = []
    for image, objects in enumerate(truth):
        for i in np.flatnonzero(matches[image].missed):
            box, class_ = objects.boxes[i], objects.classes[i]
            kind, detail = _explain_false_negative(box, class_, kept[image], found[image], names)
            mistakes.append(Mistake(image, box, class_, None, kind, detail))
    return sorted(mistakes, key=lambda m: -float((m.box[2:] - m.box[:2]).prod()))


def _explain_false_negative(box, class_: int, kept: Objects, found: Objects, names):
    """Returns the kind of mistake and its details."""
    ious = box_ious(box, kept.boxes) * (kept.classes != class_)
    if ious.max(initial=0) >= 0.5:
        i = int(ious.argmax())
        return "wrong class", f"detected as {names[kept.classes[i]]} {kept.scores[i]:.2f}"
    ious = box_ious(box, found.boxes) * (found.classes == class_)
    correct = found.scores[ious >= 0.5]
    if len(correct):
        return "low score", f"score {correct.max():.2f}"
    if ious.max(initial=0) >= POOR_IOU:
        return "poor box", f"IoU {ious.max():.2f}"
    return "missed", "no detection of this class"


def box_ious(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns the IoU [n] of an xyxy box with ``boxes`` [n, 4]; 0 if neither has an area."""
    boxes = torch.as_tensor(np.asarray(boxes, dtype=float).reshape(-1, 4))
    return box_iou(torch.as_tensor(box)[None].to(boxes), boxes)[0].nan_to_num().numpy()


# ---- Images ----


def _galleries(
    folder: Path,
    records: Sequence[Mapping],
    truth: Sequence[Objects],
    found: Sequence[Objects],
    best: Sequence[Threshold],
    names: Sequence[str],
    max_mistakes: int,
) -> Iterator[dict]:
    """Yields both galleries of the page, and replaces the images in ``folder``."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.jpg"):
        old.unlink()
    limits = np.array([threshold.score for threshold in best])
    kept = [objects.above(limits[objects.classes]) for objects in found]
    matches = match_boxes(truth, kept, len(names)).images
    false = false_positives(truth, kept, matches, names)
    missed = false_negatives(truth, kept, found, matches, names)
    for title, mistakes in (("False positives", false), ("False negatives", missed)):
        items = []
        for number, mistake in enumerate(mistakes[:max_mistakes]):
            path = Path(records[mistake.image]["file_name"])
            drawn = _draw_crop(read_image(str(path), "RGB"), mistake, truth[mistake.image], names)
            file = f"{title.lower().replace(' ', '_')}_{number:03d}.jpg"
            Image.fromarray(drawn).save(folder / file, quality=90)
            score = "" if mistake.score is None else f" {mistake.score:.2f}"
            name = names[mistake.class_]
            item = {"file": file, "caption": f"{name}{score}", "class_": name, "image": path.name}
            items.append(item | {"kind": mistake.kind, "detail": mistake.detail})
        kinds = Counter(mistake.kind for mistake in mistakes).most_common()
        yield {"title": title, "items": items, "kinds": kinds, "total": len(mistakes)}


def _draw_crop(image: np.ndarray, mistake: Mistake, truth: Objects, names) -> np.ndarray:
    """Draws the region around a mistake: its box in red, objects in white."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = mistake.box
    side = min((1 + 2 * CONTEXT) * max(x1 - x0, y1 - y0, 16), max(height, width))
    left, top = ((a + b - side) / 2 for a, b in ((x0, x1), (y0, y1)))
    left, top = (int(np.clip(v, 0, max(0, n - side))) for v, n in ((left, width), (top, height)))
    crop = image[top : top + math.ceil(side), left : left + math.ceil(side)]
    shift = np.array([left, top, left, top])
    is_object = mistake.score is None
    shown = [
        (box - shift, names[class_], WHITE)
        for box, class_ in zip(truth.boxes, truth.classes, strict=True)
        if not (is_object and (box == mistake.box).all())
    ]
    shown.append((mistake.box - shift, names[mistake.class_], RED))
    # Only the labels of objects outside the crop would be visible.
    shown = [s for s in shown if (s[0][:2] < side).all() and (s[0][2:] > 0).all()]
    boxes, labels, colors = zip(*shown, strict=True)
    scale = CROP_SIDE / max(crop.shape[:2])
    return draw_boxes(crop, np.array(boxes), labels, colors=colors, scale=scale)
