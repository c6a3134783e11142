"""An evaluation as a page to browse: a folder with index.html and its images.

AP by class and size comes from all detections. Mistakes are counted where every class is cut at its
best threshold, as ``fcos-d2`` does: a false positive is a detection that is kept and matches
nothing, a false negative an object that no kept detection matches, at an IoU of 0.5.
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
from .thresholds import DEFAULT, Threshold, best_threshold, f1_score

PICTURE_SIDE = 260
CONTEXT = 1.0  # sides of a box that are shown around it
NEAR = 0.1  # IoU from which a box is a bad box of an object rather than something else
WHITE, RED = (255, 255, 255), (213, 0, 0)


class Mistake(NamedTuple):
    """One false positive or false negative, with its image."""

    image: int
    box: np.ndarray  # xyxy
    class_: int
    score: float | None  # None for an object that was missed
    kind: str
    detail: str


def write_report(
    folder: Path,
    title: str,
    records: Sequence[Mapping],
    found: Sequence[Objects],
    class_names: Sequence[str],
    metrics: Mapping[str, Series] | None = None,
    most: int = 24,
) -> Path:
    """Writes the page and its images.

    Args:
        folder: to write into; images of an earlier report are replaced.
        title: of the page.
        records: N images with annotations, in detectron2's form.
        found: N, their detections.
        class_names: K.
        metrics: of the training, from ``read_metrics``.
        most: mistakes of each kind that are shown.

    Returns:
        the page, ``folder/index.html``.
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
            _galleries(folder / "images", records, truth, found, best, class_names, most)
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


# ---- numbers ----


def _summary(
    evaluation: Evaluation, best: Sequence[Threshold], truth: Sequence[Objects]
) -> dict[str, str]:
    average, curves = evaluation.average, evaluation.curves
    f1 = 100 * f1_score(curves, [t.score for t in best])
    fixed = 100 * f1_score(curves, [DEFAULT] * len(best))
    values = {"AP": average(), "AP50": average(iou=0), "AP75": average(iou=5)}
    if evaluation.most > COCO_DETECTIONS:
        values[f"AP of {evaluation.most} detections"] = evaluation.average_of_all()
    values |= {"F1": f1, f"F1 at {DEFAULT}": fixed}
    shown = {name: "–" if math.isnan(v) else f"{v:.1f}" for name, v in values.items()}
    objects = sum(curve.num_objects for curve in curves)
    return {"images": str(len(truth)), "objects": str(objects), **shown}


def _size_rows(evaluation: Evaluation, truth: Sequence[Objects]) -> list[dict]:
    boxes = np.concatenate([np.zeros((0, 4)), *(o.boxes[~o.crowd] for o in truth)])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    limits = [(0, math.inf), (0, 32**2), (32**2, 96**2), (96**2, math.inf)]
    words = ["all", "below 32 × 32 pixels", "up to 96 × 96 pixels", "more"]
    rows = []
    for size, ((low, high), name) in enumerate(zip(limits, words, strict=True)):
        count = int(((areas >= low) & (areas < high)).sum())
        averages = [evaluation.average(iou, size=size) for iou in (None, 0, 5)]
        rows.append({"name": f"{SIZES[size]}: {name}" if size else name, "count": count})
        rows[-1] |= dict(zip(("ap", "ap50", "ap75"), averages, strict=True))
    return rows


def _class_rows(evaluation: Evaluation, best: Sequence[Threshold], names) -> list[dict]:
    rows = []
    for class_, (name, threshold) in enumerate(zip(names, best, strict=True)):
        averages = [evaluation.average(iou, class_) for iou in (None, 0, 5)]
        row = {"name": name, "count": evaluation.curves[class_].num_objects}
        row |= dict(zip(("ap", "ap50", "ap75"), averages, strict=True))
        row |= {key: 100 * getattr(threshold, key) for key in ("f1", "precision", "recall")}
        row["color"] = "#{:02x}{:02x}{:02x}".format(*class_color(class_))
        rows.append(row | {"threshold": f"{threshold.score:.2f}"})
    return rows


# ---- mistakes ----


def false_positives(
    truth: Sequence[Objects],
    found: Sequence[Objects],
    matches: Sequence[ImageMatches],
    names: Sequence[str],
) -> list[Mistake]:
    """Detections that match nothing, the surest first, each with what it was instead."""
    mistakes = []
    for image, (objects, detections, match) in enumerate(zip(truth, found, matches, strict=True)):
        for i in np.flatnonzero((match.found < 0) & ~match.ignored):
            box, class_ = detections.boxes[i], detections.classes[i]
            kind, detail = _explain(box, class_, objects, names)
            mistakes.append(Mistake(image, box, class_, detections.scores[i], kind, detail))
    return sorted(mistakes, key=lambda m: -m.score)


def _explain(box: np.ndarray, class_: int, objects: Objects, names) -> tuple[str, str]:
    overlaps = box_ious(box, objects.boxes)
    own, other = (overlaps * (objects.classes == class_), overlaps * (objects.classes != class_))
    if own.max(initial=0) >= 0.5:
        return "duplicate", "the object is found by a better box"
    if other.max(initial=0) >= 0.5:
        return "wrong class", f"it is {names[objects.classes[int(other.argmax())]]}"
    if own.max(initial=0) >= NEAR:
        return "poor box", f"IoU {own.max():.2f}"
    return "background", "no such object there"


def false_negatives(
    truth: Sequence[Objects],
    kept: Sequence[Objects],
    found: Sequence[Objects],
    matches: Sequence[ImageMatches],
    names: Sequence[str],
) -> list[Mistake]:
    """Objects that no kept detection matches, the largest first, each with what was found there."""
    mistakes = []
    for image, objects in enumerate(truth):
        for i in np.flatnonzero(matches[image].missed):
            box, class_ = objects.boxes[i], objects.classes[i]
            kind, detail = _explain_miss(box, class_, kept[image], found[image], names)
            mistakes.append(Mistake(image, box, class_, None, kind, detail))
    return sorted(mistakes, key=lambda m: -float((m.box[2:] - m.box[:2]).prod()))


def _explain_miss(box, class_: int, kept: Objects, found: Objects, names) -> tuple[str, str]:
    overlaps = box_ious(box, kept.boxes) * (kept.classes != class_)
    if overlaps.max(initial=0) >= 0.5:
        i = int(overlaps.argmax())
        return "wrong class", f"found as {names[kept.classes[i]]} {kept.scores[i]:.2f}"
    overlaps = box_ious(box, found.boxes) * (found.classes == class_)
    right = found.scores[overlaps >= 0.5]
    if len(right):
        return "low score", f"found with {right.max():.2f}"
    if overlaps.max(initial=0) >= NEAR:
        return "poor box", f"IoU {overlaps.max():.2f}"
    return "not found", "nothing of its class there"


def box_ious(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU [n] of one xyxy box with ``boxes`` [n, 4]; 0 where both have no area."""
    boxes = torch.as_tensor(np.asarray(boxes, dtype=float).reshape(-1, 4))
    return box_iou(torch.as_tensor(box)[None].to(boxes), boxes)[0].nan_to_num().numpy()


# ---- images ----


def _galleries(
    folder: Path,
    records: Sequence[Mapping],
    truth: Sequence[Objects],
    found: Sequence[Objects],
    best: Sequence[Threshold],
    names: Sequence[str],
    most: int,
) -> Iterator[dict]:
    """Both galleries of the page; their images replace those in ``folder``."""
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
        for number, mistake in enumerate(mistakes[:most]):
            path = Path(records[mistake.image]["file_name"])
            drawn = _close_up(read_image(str(path), "RGB"), mistake, truth[mistake.image], names)
            file = f"{title.lower().replace(' ', '_')}_{number:03d}.jpg"
            Image.fromarray(drawn).save(folder / file, quality=90)
            score = "" if mistake.score is None else f" {mistake.score:.2f}"
            name = names[mistake.class_]
            item = {"file": file, "caption": f"{name}{score}", "class_": name, "image": path.name}
            items.append(item | {"kind": mistake.kind, "detail": mistake.detail})
        kinds = Counter(mistake.kind for mistake in mistakes).most_common()
        yield {"title": title, "items": items, "kinds": kinds, "total": len(mistakes)}


def _close_up(image: np.ndarray, mistake: Mistake, truth: Objects, names) -> np.ndarray:
    """What surrounds a mistake: the box in red, objects in white."""
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
    # Objects further away would only leave their tags at the border.
    shown = [s for s in shown if (s[0][:2] < side).all() and (s[0][2:] > 0).all()]
    boxes, labels, colors = zip(*shown, strict=True)
    scale = PICTURE_SIDE / max(crop.shape[:2])
    return draw_boxes(crop, np.array(boxes), labels, colors=colors, scale=scale)
