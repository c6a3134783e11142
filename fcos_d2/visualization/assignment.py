"""What a model learns from and what it says, point by point: assignment and heat maps.

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
from .boxes import PANEL_SIDE, class_color, draw_objects, factors, pixels, resize
from .sheet import contact_sheet

CROSS = (190, 190, 190)
DETECTION_THRESHOLD = 0.3  # for the panels shown during training
FINE = 4  # points are drawn at so many times the size, then reduced: their edges are smooth


def draw_assignment(
    image: np.ndarray,
    labels: np.ndarray,
    levels: Levels,
    num_classes: int,
    centerness: np.ndarray,
    boxes: np.ndarray,
) -> np.ndarray:
    """One panel per pyramid level, side by side, with every point of the level.

    A positive point is a disc in the color of its class, larger where centerness is higher; a
    background point is a faint dot; an ignored point is a gray cross. Points in the padding of the
    batch are left out.

    Args:
        image: uint8 [H, W, 3], RGB, without padding.
        labels: int [P]; class in [0, num_classes), ``num_classes`` for background, -1 to ignore.
        levels: where the points lie (``fcos_d2.ops.make_levels``).
        num_classes: K.
        centerness: [P] in [0, 1].
        boxes: [N, 4], outlined in white.

    Returns:
        uint8 [h, w, 3], RGB.
    """
    labels, points = np.asarray(labels, dtype=int), point_coordinates(levels).numpy()
    if labels.shape != (levels.num_points,):
        raise ValueError(
            f"draw_assignment: labels must have shape [{levels.num_points}] as levels has, got "
            f"{list(labels.shape)}; pass those of one image"
        )
    size = np.where(labels < 0, 0.7, 0.3 + 0.7 * np.asarray(centerness))
    pitch = min((min(pitch) for pitch in levels.pitches), default=1)
    scale = max(PANEL_SIDE / max(image.shape[:2]), 4 / pitch)  # points at least 4 pixels apart
    ground = _dimmed(image, boxes, scale)
    seen = (points < (image.shape[1], image.shape[0])).all(axis=1)
    points = points * factors(image, ground)[:2]
    panels, titles, end = [], [], 0
    for count, stride, pitch in zip(
        levels.points_per_level, levels.strides, levels.pitches, strict=True
    ):
        own = np.arange(end, end := end + count)
        own = own[seen[own]]
        radii = size[own] * min(max(0.42 * min(pitch) * scale, 1.5), 9.0)
        panels.append(_draw_points(ground, points[own], labels[own], radii, num_classes))
        positive = int(((labels[own] >= 0) & (labels[own] < num_classes)).sum())
        titles.append(f"{_level_name(stride)}   {positive} positive")
    return contact_sheet([panels], titles)


def _dimmed(image: np.ndarray, boxes: np.ndarray, scale: float) -> Image.Image:
    """The image in dim gray, so that nothing but the points has a color."""
    ground = resize(image, scale).convert("L").point(lambda v: 25 + 0.4 * v).convert("RGB")
    draw = ImageDraw.Draw(ground, "RGBA")
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    for box in boxes[np.isfinite(boxes).all(axis=1)] * factors(image, ground):
        draw.rectangle(pixels(box, ground.size, 0), outline=(255, 255, 255, 130))
    return ground


def _draw_points(ground: Image.Image, points, labels, radii, num_classes: int) -> np.ndarray:
    layer = Image.new("RGBA", (ground.width * FINE, ground.height * FINE))
    draw = ImageDraw.Draw(layer)
    order = np.argsort(labels != num_classes, kind="stable")  # background below everything else
    for center, label, radius in zip(
        points[order] * FINE, labels[order].tolist(), radii[order] * FINE, strict=True
    ):
        if label == num_classes:
            draw.ellipse(_square(center, FINE), fill=(255, 255, 255, 80))
        elif label < 0:
            x0, y0, x1, y1 = _square(center, min(0.5 * radius, 4 * FINE))
            for ends in ((x0, y0, x1, y1), (x0, y1, x1, y0)):
                draw.line(ends, fill=CROSS, width=round(1.5 * FINE))
        else:
            radius = max(radius, 1.5 * FINE)
            draw.ellipse(_square(center, radius + 0.75 * FINE), fill=(0, 0, 0, 160))
            draw.ellipse(_square(center, radius), fill=class_color(label))
    panel = ground.convert("RGBA")
    panel.alpha_composite(layer.reduce(FINE))
    return np.asarray(panel.convert("RGB"))


def _square(center: np.ndarray, radius: float) -> tuple[float, ...]:
    return (*(center - radius), *(center + radius))


def _level_name(stride: int) -> str:
    name = f"p{stride.bit_length() - 1}   " if stride & (stride - 1) == 0 else ""
    return f"{name}stride {stride}"


# ---- heat maps ----


def draw_heat_maps(
    image: np.ndarray, rows: Mapping[str, Sequence[np.ndarray]], levels: Levels
) -> np.ndarray:
    """What a model says at every point of every level, as colors from black (0) to white (1).

    Every point colors the cell around it; the image shows through.

    Args:
        image: uint8 [H, W, 3], RGB, without padding.
        rows: by name, one map [H, W] in [0, 1] per level, such as class probability or centerness;
            a row of panels each.
        levels: where the points lie.

    Returns:
        uint8 [h, w, 3], RGB.
    """
    rows = {name: [np.asarray(level) for level in maps] for name, maps in rows.items()}
    for maps in rows.values():
        if [level.shape for level in maps] != list(levels.shapes):
            raise ValueError(
                f"draw_heat_maps: maps must have the shapes {list(levels.shapes)} of levels, got "
                f"{[level.shape for level in maps]}; pass those of one image"
            )
    scale = max(1.0, PANEL_SIDE / max(image.shape[:2]))
    ground = resize(image, scale).convert("L").convert("RGB")
    panels = [
        [_draw_heat(ground, *pair, scale) for pair in zip(maps, levels.pitches, strict=True)]
        for maps in rows.values()
    ]
    captions = [[f"{name} {m.min():.2f} to {m.max():.2f}" for m in rows[name]] for name in rows]
    return contact_sheet(panels, [_level_name(s) for s in levels.strides], captions=captions)


def _draw_heat(ground: Image.Image, values: np.ndarray, pitch, scale: float) -> np.ndarray:
    cells = Image.fromarray(matplotlib.colormaps["inferno"](values.clip(0, 1), bytes=True)[..., :3])
    # Cells reach beyond the image where the batch is padded; what lies outside is cut off.
    size = (cells.width * pitch[1] * scale, cells.height * pitch[0] * scale)
    heat = Image.new("RGB", ground.size)
    heat.paste(cells.resize([max(1, round(side)) for side in size], Image.Resampling.NEAREST))
    return np.asarray(Image.blend(ground, heat, 0.7))


# ---- what a model sees and finds ----


def training_panels(
    model: nn.Module,
    batched_inputs: Sequence[Mapping],
    max_detections: int = 20,
    class_names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """What the model should find, which points are to find it, and what it finds by now.

    Shows the first image. Leaves no trace: no gradient, no statistics, every module in its mode.

    Args:
        model: fcos_d2.modeling.FCOS.
        batched_inputs: images with ground truth in ``"instances"``, as for training.
        max_detections: the best ones that are drawn, of those that score 0.3 or more.
        class_names: K names; the numbers of the classes where None.

    Returns:
        ``{"ground_truth", "assignment", "heat", "detections"}``: uint8 [h, w, 3] each, RGB.
        "heat" is the highest class probability and the box quality at every point.
    """
    first = batched_inputs[0]
    image = to_rgb(first["image"], model.input_format)
    scale = max(1.0, 1.5 * PANEL_SIDE / max(image.shape[:2]))
    with torch.no_grad(), _evaluating(model):
        assignment, heat = _assignment_and_heat(model, first, image)
        # Without "height" and "width" the boxes stay in pixels of this image.
        found = model([{"image": first["image"]}])[0]["instances"].to("cpu")
    truth = first["instances"].to("cpu")
    enough = found[found.scores >= DETECTION_THRESHOLD]
    best = enough[enough.scores.argsort(descending=True, stable=True)[:max_detections]]
    title = f"{len(best)} of {len(enough)} detections with a score of {DETECTION_THRESHOLD} or more"
    objects = (truth.gt_boxes.tensor, truth.gt_classes, class_names)
    shown = (best.pred_boxes.tensor, best.pred_classes, class_names, best.scores)
    truth = draw_objects(image, *objects, scale=scale)
    shown = draw_objects(image, *shown, scale=scale)
    return {
        "ground_truth": contact_sheet([[truth]], [f"ground truth, {len(objects[0])} objects"]),
        "assignment": assignment,
        "heat": heat,
        "detections": contact_sheet([[shown]], [title]),
    }


def _assignment_and_heat(
    model: nn.Module, inputs: Mapping, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both panels of one image, by the model's own levels and rules."""
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode back (some may be frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def to_rgb(image: torch.Tensor, image_format: str) -> np.ndarray:
    """[C, H, W] in the model's channel order -> uint8 [H, W, 3], RGB."""
    rgb = convert_image_to_rgb(image.detach().cpu().permute(1, 2, 0), image_format)
    return np.ascontiguousarray(np.clip(np.rint(rgb), 0, 255).astype(np.uint8))
