"""Draws the assignment of points to objects, and heat maps of predictions.

P points of all pyramid levels, level-major, row-major inside a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from PIL import Image, ImageDraw
from torch import nn

from ..modeling.structures import pack_ground_truth
from ..ops import Levels, point_coordinates
from .boxes import PANEL_SIDE, box_scale, class_color, draw_objects, enlarge, pixel_box
from .sheet import contact_sheet

IGNORED_COLOR = (190, 190, 190)
DETECTION_THRESHOLD = 0.3  # of the panels during training
SUPERSAMPLING = 4  # points are drawn larger by this factor and reduced, for antialiasing


def draw_assignment(
    image: np.ndarray,
    labels: np.ndarray,
    levels: Levels,
    num_classes: int,
    centerness: np.ndarray,
    boxes: np.ndarray,
) -> np.ndarray:
    """Draws the points of each pyramid level in a panel.

    Positive points are discs in the color of their class, whose size grows with centerness,
    background points are faint dots, and ignored points gray crosses. Points in the padding of the
    batch are not drawn.

    Args:
        image: uint8 [H, W, 3], RGB, without padding.
        labels: int [P]; class in [0, num_classes), ``num_classes`` for background, -1 to ignore.
        levels: geometry of the points, from ``fcos_d2.ops.make_levels``.
        num_classes: K.
        centerness: [P] in [0, 1].
        boxes: [N, 4], outlined in white.

    Returns:
        uint8 [h, w, 3], RGB.
    """
    labels, points = np.asarray(labels, dtype=int), point_coordinates(levels).numpy()
    if labels.shape != (levels.num_points,):
        raise ValueError(
            f"draw_assignment: labels must have shape [{levels.num_points}] to fit levels, got "
            f"{list(labels.shape)}; pass the labels of one image"
        )
    size = np.where(labels < 0, 0.7, 0.3 + 0.7 * np.asarray(centerness))
    pitch = min((min(pitch) for pitch in levels.pitches), default=1)
    scale = max(PANEL_SIDE / max(image.shape[:2]), 4 / pitch)  # points at least 4 pixels apart
    background = _dim(image, boxes, scale)
    is_inside = (points < (image.shape[1], image.shape[0])).all(axis=1)
    points = points * box_scale(image, background)[:2]
    panels, titles, end = [], [], 0
    for count, stride, pitch in zip(
        levels.points_per_level, levels.strides, levels.pitches, strict=True
    ):
        drawn = np.arange(end, end := end + count)
        drawn = drawn[is_inside[drawn]]
        radii = size[drawn] * min(max(0.42 * min(pitch) * scale, 1.5), 9.0)
        panels.append(_draw_points(background, points[drawn], labels[drawn], radii, num_classes))
        positive = int(((labels[drawn] >= 0) & (labels[drawn] < num_classes)).sum())
        titles.append(f"{_level_name(stride)}   {positive} positive")
    return contact_sheet([panels], titles)


def _dim(image: np.ndarray, boxes: np.ndarray, scale: float) -> Image.Image:
    """Returns the enlarged image in dim gray, with outlined boxes."""
    dimmed = enlarge(image, scale).convert("L").point(lambda v: 25 + 0.4 * v).convert("RGB")
    draw = ImageDraw.Draw(dimmed, "RGBA")
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    for box in boxes[np.isfinite(boxes).all(axis=1)] * box_scale(image, dimmed):
        draw.rectangle(pixel_box(box, dimmed.size, 0), outline=(255, 255, 255, 130))
    return dimmed


def _draw_points(background: Image.Image, points, labels, radii, num_classes: int) -> np.ndarray:
    unit = SUPERSAMPLING
    layer = Image.new("RGBA", (background.width * unit, background.height * unit))
    draw = ImageDraw.Draw(layer)
    order = np.argsort(labels != num_classes, kind="stable")  # background points first
    for center, label, radius in zip(
        points[order] * unit, labels[order].tolist(), radii[order] * unit, strict=True
    ):
        if label == num_classes:
            draw.ellipse(_square(center, unit), fill=(255, 255, 255, 80))
        elif label < 0:
            x0, y0, x1, y1 = _square(center, min(0.5 * radius, 4 * unit))
            for ends in ((x0, y0, x1, y1), (x0, y1, x1, y0)):
                draw.line(ends, fill=IGNORED_COLOR, width=round(1.5 * unit))
        else:
            radius = max(radius, 1.5 * unit)
            draw.ellipse(_square(center, radius + 0.75 * unit), fill=(0, 0, 0, 160))
            draw.ellipse(_square(center, radius), fill=class_color(label))
    panel = background.convert("RGBA")
    panel.alpha_composite(layer.reduce(unit))
    return np.asarray(panel.convert("RGB"))


def _square(center: np.ndarray, radius: float) -> tuple[float, ...]:
    return (*(center - radius), *(center + radius))


def _level_name(stride: int) -> str:
    name = f"p{stride.bit_length() - 1}   " if stride & (stride - 1) == 0 else ""
    return f"{name}stride {stride}"


# ---- Heat maps ----


def draw_heat_maps(
    image: np.ndarray, rows: Mapping[str, Sequence[np.ndarray]], levels: Levels
) -> np.ndarray:
    """Draws predictions over the image, in colors from black (0) to white (1).

    Each value fills the cell around its point.

    Args:
        image: uint8 [H, W, 3], RGB, without padding.
        rows: maps [H, W] in [0, 1] of all levels by name, such as class probability or centerness;
            each name is a row of panels.
        levels: geometry of the points.

    Returns:
        uint8 [h, w, 3], RGB.
    """
    rows = {name: [np.asarray(level) for level in maps] for name, maps in rows.items()}
    for maps in rows.values():
        if [level.shape for level in maps] != list(levels.shapes):
            raise ValueError(
                f"draw_heat_maps: maps must have the shapes {list(levels.shapes)} of levels, got "
                f"{[level.shape for level in maps]}; pass the maps of one image"
            )
    scale = max(1.0, PANEL_SIDE / max(image.shape[:2]))
    background = enlarge(image, scale).convert("L").convert("RGB")
    panels = [
        [_draw_heat(background, *pair, scale) for pair in zip(maps, levels.pitches, strict=True)]
        for maps in rows.values()
    ]
    captions = [[f"{name} {m.min():.2f} to {m.max():.2f}" for m in rows[name]] for name in rows]
    return contact_sheet(panels, [_level_name(s) for s in levels.strides], captions=captions)


def _draw_heat(background: Image.Image, values: np.ndarray, pitch, scale: float) -> np.ndarray:
    cells = Image.fromarray(matplotlib.colormaps["inferno"](values.clip(0, 1), bytes=True)[..., :3])
    # Pasting crops the cells in the padding of the batch.
    size = (cells.width * pitch[1] * scale, cells.height * pitch[0] * scale)
    heat = Image.new("RGB", background.size)
    heat.paste(cells.resize([max(1, round(side)) for side in size], Image.Resampling.NEAREST))
    return np.asarray(Image.blend(background, heat, 0.7))


# ---- Panels of a model ----


def training_panels(
    model: nn.Module,
    batched_inputs: Sequence[Mapping],
    max_detections: int = 20,
    class_names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Draws ground truth, assignment, predictions and detections of the first image.

    Does not change the state of the model.

    Args:
        model: fcos_d2.modeling.FCOS.
        batched_inputs: images with ground truth in ``"instances"``, as for training.
        max_detections: maximum number of detections drawn, all with scores of at least 0.3.
        class_names: K names; None to use class indices.

    Returns:
        ``{"ground_truth", "assignment", "heat", "detections"}``: uint8 [h, w, 3] each, RGB.
        "heat" shows the highest class probability and the box quality at every point.
    """
    first = batched_inputs[0]
    image = to_rgb(first["image"], model.input_format)
    scale = max(1.0, 1.5 * PANEL_SIDE / max(image.shape[:2]))
    with torch.no_grad(), _eval_mode(model):
        assignment, heat = _assignment_and_heat(model, first, image)
        # Without "height" and "width", boxes are not scaled to the original image.
        found = model([{"image": first["image"]}])[0]["instances"].to("cpu")
    truth = first["instances"].to("cpu")
    found = found[found.scores >= DETECTION_THRESHOLD]
    best = found[found.scores.argsort(descending=True, stable=True)[:max_detections]]
    title = f"{len(best)} of {len(found)} detections with scores of at least {DETECTION_THRESHOLD}"
    objects = (truth.gt_boxes.tensor, truth.gt_classes, class_names)
    detections = (best.pred_boxes.tensor, best.pred_classes, class_names, best.scores)
    objects = draw_objects(image, *objects, scale=scale)
    detections = draw_objects(image, *detections, scale=scale)
    return {
        "ground_truth": contact_sheet([[objects]], [f"ground truth, {len(truth)} objects"]),
        "assignment": assignment,
        "heat": heat,
        "detections": contact_sheet([[detections]], [title]),
    }


def _assignment_and_heat(
    model: nn.Module, inputs: Mapping, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws both panels of one image with the levels and assignment rules of the model."""
    images, features, predictions = model.dense_predictions([inputs])
    levels = model.levels(features, images)
    truth = inputs["instances"].to(model.device)
    targets = model.losses.assign(pack_ground_truth([truth]), levels)
    assignment = draw_assignment(
        image,
        targets.labels[0].cpu(),
        levels,
        model.losses.num_classes,
        targets.centerness[0].cpu(),
        truth.gt_boxes.tensor.cpu(),
    )
    rows = {
        "class probability": [m[0].float().sigmoid().amax(0).cpu() for m in predictions.logits],
        model.losses.box_quality: [m[0, 0].float().sigmoid().cpu() for m in predictions.quality],
    }
    return assignment, draw_heat_maps(image, rows, levels)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode; restores the mode of each module, since some may be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def to_rgb(image: torch.Tensor, image_format: str) -> np.ndarray:
    """Tensor[C, H, W] in the channel order ``image_format`` -> uint8 [H, W, 3], RGB."""
    rgb = convert_image_to_rgb(image.detach().cpu().permute(1, 2, 0), image_format)
    return np.ascontiguousarray(np.clip(np.rint(rgb), 0, 255).astype(np.uint8))
