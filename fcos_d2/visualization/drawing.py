"""Pictures: boxes, the assignment of ground truth to points, heat maps, contact sheets.

Images are uint8 ``[H, W, 3]`` arrays, RGB, unless said otherwise; boxes are xyxy in pixels of their
image. N boxes of an image; P points of all pyramid levels, level-major, row-major inside a level.
Nothing here opens a window, keeps state or needs a display.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ..modeling.structures import pack_ground_truth
from ..ops import Levels, point_coordinates

Color = tuple[int, int, int]

# The seven colours of Okabe and Ito (jfly.uni-koeln.de/color), continued by those that are furthest
# from all before them in OKLab, also as seen without red or green cones (Machado et al., 2009).
PALETTE: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (136, 34, 85),
    (110, 245, 235),
    (105, 40, 240),
    (125, 215, 120),
    (115, 80, 10),
)
GREY: Color = (150, 150, 150)
CROSS: Color = (190, 190, 190)
INK: Color = (50, 50, 50)
PAPER: Color = (255, 255, 255)
GUTTER = 6
PANEL_SIDE = 320  # a picture smaller than this is enlarged, so that its labels have room
DETECTION_THRESHOLD = 0.3  # for the panels shown during training


def class_color(index: int) -> Color:
    """The colour of class ``index``; grey for -1, the regions to ignore."""
    if index < 0:
        return GREY
    if index < len(PALETTE):
        return PALETTE[index]
    # Beyond what eyes can name, neighbours at least differ: the golden ratio spreads the hues.
    step = index - len(PALETTE)
    hue, lightness = (0.08 + step * 0.618034) % 1, (0.45, 0.62, 0.78)[step % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


# ---- boxes ----


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    colors: Sequence[Color] | None = None,
    scale: float = 1.0,
) -> np.ndarray:
    """Draws thin boxes, each with a small tag, over the enlarged image.

    Args:
        image: uint8 [H, W, 3], RGB; not changed.
        boxes: [N, 4], xyxy in pixels of ``image``; one that is not finite is left out.
        labels: N texts.
        scores: N numbers in [0, 1], written behind the labels; the best box is drawn on top.
        colors: N colours; all boxes alike where None.
        scale: enlargement of the picture; lines and letters are not enlarged with it.

    Returns:
        uint8 [round(H * scale), round(W * scale), 3], RGB.
    """
    canvas = _resize(image, scale)
    boxes = _as_array(boxes).reshape(-1, 4) * _factors(image, canvas)
    order = np.arange(len(boxes))
    if scores is not None:
        scores = _as_array(scores)
        order = np.argsort(scores, kind="stable")
    order = order[np.isfinite(boxes[order]).all(axis=1)]
    colors = [PALETTE[0]] * len(boxes) if colors is None else [tuple(c) for c in colors]
    draw = ImageDraw.Draw(canvas, "RGBA")
    for i in order:
        _draw_outline(draw, canvas.size, boxes[i], colors[i])
    font = _font(_clamp(min(canvas.size) / 27, 10, 15))
    taken: list[tuple[float, float, float, float]] = []
    for i in order[::-1]:  # the best box chooses the place of its tag first
        text = [] if labels is None else [str(labels[i])]
        text += [] if scores is None else [f"{scores[i]:.2f}"]
        if text:
            _draw_tag(draw, canvas.size, boxes[i], " ".join(text), colors[i], font, boxes, taken)
    return np.asarray(canvas)


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    class_names: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    scale: float = 1.0,
) -> np.ndarray:
    """``draw_boxes`` with the name and the colour of each box's class; -1 is a region to ignore."""
    classes = [int(c) for c in classes]
    names = ["ignored" if c < 0 else _class_name(c, class_names) for c in classes]
    colors = [class_color(c) for c in classes]
    return draw_boxes(image, boxes, names, scores, colors, scale)


def _class_name(index: int, names: Sequence[str] | None) -> str:
    return names[index] if names is not None and index < len(names) else str(index)


def _draw_outline(draw: ImageDraw.ImageDraw, size, box: np.ndarray, color: Color) -> None:
    """A line of 1 to 3 pixels on the border of ``box`` between two contrasting hairlines."""
    width = _clamp(min(size) / 160, 1, 3)
    outside = width // 2  # the line straddles the border, so that small objects stay visible
    x0, y0, x1, y1 = _pixels(box, size, outside)
    contrast = (*_contrast(color), 120)
    for hairline in (_grow((x0, y0, x1, y1), 1), _grow((x0, y0, x1, y1), -width)):
        if hairline[0] <= hairline[2] and hairline[1] <= hairline[3]:
            draw.rectangle(hairline, outline=contrast)
    draw.rectangle((x0, y0, x1, y1), outline=color, width=width)


def _pixels(box: np.ndarray, size: tuple[int, int], outside: int) -> tuple[int, int, int, int]:
    """First and last column and row of a box grown by ``outside``, kept inside the picture."""
    width, height = size
    limit = np.array([width, height, width, height]) - 1
    x0, y0, x1, y1 = np.rint(np.clip(box, -1e6, 1e6)).astype(int) - (0, 0, 1, 1)
    grown = np.array([x0 - outside, y0 - outside, x1 + outside, y1 + outside]).clip(0, limit)
    x0, y0, x1, y1 = (int(v) for v in grown)
    return x0, y0, max(x0, x1), max(y0, y1)


def _grow(box: tuple[int, int, int, int], by: int) -> tuple[int, int, int, int]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _draw_tag(draw, size, box, text, color, font, boxes, taken) -> None:
    """Writes ``text`` where it covers least, of seven places at the box; adds that to ``taken``."""
    width, height = math.ceil(font.getlength(text)) + 5, round(font.size) + 3
    x0, y0, x1, y1 = _pixels(box, size, 1)
    right, above, below = x1 + 1 - width, y0 - height, y1 + 1
    places = [(x0, above), (right, above), (x0, below), (right, below)]
    places += [(x1 + 1, y0), (x0 - width, y0), (x0, y0)]
    rivals = np.concatenate([np.reshape(taken, (-1, 4)), boxes])
    weight = np.array([10.0] * len(taken) + [1.0] * len(boxes))

    def covered(place: tuple[int, int]) -> float:
        tag = np.array([*place, place[0] + width, place[1] + height])
        sides = np.minimum(rivals[:, 2:], tag[2:]) - np.maximum(rivals[:, :2], tag[:2])
        return float((np.nan_to_num(sides).clip(0).prod(axis=1) * weight).sum())

    bounds = (max(0, size[0] - width), max(0, size[1] - height))
    places = [(_clamp(x, 0, bounds[0]), _clamp(y, 0, bounds[1])) for x, y in places]
    x, y = min(places, key=covered)
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    draw.text((x + 3, y + height / 2), text, fill=_contrast(color), font=font, anchor="lm")


# ---- assignment ----


def draw_assignment(
    image: np.ndarray,
    labels: np.ndarray,
    levels: Levels,
    num_classes: int,
    centerness: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
) -> np.ndarray:
    """One panel per pyramid level, side by side, with every point of the level.

    A positive point is a disc in the colour of its class, larger where centerness is higher; a
    background point is a faint dot; an ignored point is a grey cross. Points in the padding of the
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
    labels, points = _as_array(labels).astype(int), point_coordinates(levels).numpy()
    if labels.shape != (levels.num_points,):
        raise ValueError(
            f"draw_assignment: labels must have shape [{levels.num_points}] as levels has, got "
            f"{list(labels.shape)}; pass those of one image"
        )
    size = np.full(len(points), 0.7)
    if centerness is not None:
        size = np.where(labels < 0, 0.7, 0.3 + 0.7 * _as_array(centerness))
    pitch = min((min(pitch) for pitch in levels.pitches), default=1)
    scale = max(PANEL_SIDE / max(image.shape[:2]), 4 / pitch)  # points at least 4 pixels apart
    ground = _assignment_ground(image, boxes, scale)
    seen = (points < (image.shape[1], image.shape[0])).all(axis=1)
    points = points * _factors(image, ground)[:2]
    panels, titles, end = [], [], 0
    for count, stride, pitch in zip(
        levels.points_per_level, levels.strides, levels.pitches, strict=True
    ):
        own = np.arange(end, end := end + count)
        own = own[seen[own]]
        reach = min(max(0.42 * min(pitch) * scale, 1.5), 9.0)
        panels.append(
            _draw_points(ground, points[own], labels[own], size[own] * reach, num_classes)
        )
        positive = int(((labels[own] >= 0) & (labels[own] < num_classes)).sum())
        titles.append(f"{_level_name(stride)}stride {stride}   {positive} positive")
    return contact_sheet([panels], titles)


def _assignment_ground(image: np.ndarray, boxes: np.ndarray | None, scale: float) -> Image.Image:
    """The picture in dim grey, so that nothing but the points has a colour."""
    ground = _resize(image, scale).convert("L").point(lambda v: 25 + 0.4 * v).convert("RGB")
    draw = ImageDraw.Draw(ground, "RGBA")
    boxes = _as_array([] if boxes is None else boxes).reshape(-1, 4) * _factors(image, ground)
    for box in boxes[np.isfinite(boxes).all(axis=1)]:
        draw.rectangle(_pixels(box, ground.size, 0), outline=(255, 255, 255, 130))
    return ground


def _draw_points(ground: Image.Image, points, labels, radii, num_classes: int) -> np.ndarray:
    """Draws the points of one level with smooth edges: at 4 times the size, then reduced."""
    fine = 4
    layer = Image.new("RGBA", (ground.width * fine, ground.height * fine))
    draw = ImageDraw.Draw(layer)
    order = np.argsort(labels != num_classes, kind="stable")  # background below everything else
    for (x, y), label, radius in zip(
        points[order] * fine, labels[order].tolist(), radii[order] * fine, strict=True
    ):
        if label == num_classes:
            draw.ellipse(_square(x, y, fine), fill=(255, 255, 255, 80))
        elif label < 0:
            x0, y0, x1, y1 = _square(x, y, min(0.5 * radius, 4 * fine))
            for ends in ((x0, y0, x1, y1), (x0, y1, x1, y0)):
                draw.line(ends, fill=CROSS, width=round(1.5 * fine))
        else:
            radius = max(radius, 1.5 * fine)
            draw.ellipse(_square(x, y, radius + 0.75 * fine), fill=(0, 0, 0, 160))
            draw.ellipse(_square(x, y, radius), fill=class_color(label))
    panel = ground.convert("RGBA")
    panel.alpha_composite(layer.reduce(fine))
    return np.asarray(panel.convert("RGB"))


def _square(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _level_name(stride: int) -> str:
    return f"p{stride.bit_length() - 1}   " if stride & (stride - 1) == 0 else ""


# ---- heat maps ----


def draw_heat_maps(
    image: np.ndarray, rows: Mapping[str, Sequence[np.ndarray]], levels: Levels
) -> np.ndarray:
    """What a model says at every point of every level, as colours from black (0) to white (1).

    Every point colours the cell around it; the image shows through.

    Args:
        image: uint8 [H, W, 3], RGB, without padding.
        rows: by name, one map [H, W] in [0, 1] per level, such as class probability or centerness;
            a row of panels each.
        levels: where the points lie.

    Returns:
        uint8 [h, w, 3], RGB.
    """
    scale = max(1.0, PANEL_SIDE / max(image.shape[:2]))
    ground = _resize(image, scale).convert("L")
    panels = [
        [_draw_heat(ground, values, pitch, scale) for values, pitch in _with_pitch(maps, levels)]
        for maps in rows.values()
    ]
    captions = [
        [f"{name} {_as_array(m).min():.2f} to {_as_array(m).max():.2f}" for m in maps]
        for name, maps in rows.items()
    ]
    titles = [f"{_level_name(stride)}stride {stride}" for stride in levels.strides]
    return contact_sheet(panels, titles, captions=captions)


def _with_pitch(maps: Sequence[np.ndarray], levels: Levels):
    if [np.shape(m) for m in maps] != list(levels.shapes):
        raise ValueError(
            f"draw_heat_maps: maps must have the shapes {list(levels.shapes)} of levels, got "
            f"{[np.shape(m) for m in maps]}; pass those of one image"
        )
    return zip(maps, levels.pitches, strict=True)


def _draw_heat(ground: Image.Image, values: np.ndarray, pitch, scale: float) -> np.ndarray:
    colors = matplotlib.colormaps["inferno"](_as_array(values).clip(0, 1))[..., :3]
    cells = Image.fromarray((255 * colors).round().astype(np.uint8))
    # Cells reach beyond the image where the batch is padded; what lies outside is cut off.
    size = (cells.width * pitch[1] * scale, cells.height * pitch[0] * scale)
    size = tuple(max(1, round(side)) for side in size)
    heat = Image.new("RGB", ground.size)
    heat.paste(cells.resize(size, Image.Resampling.NEAREST))
    return np.asarray(Image.blend(ground.convert("RGB"), heat, 0.7))


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
    truth = first["instances"]
    boxes, classes = truth.gt_boxes.tensor.cpu().numpy(), truth.gt_classes.tolist()
    with torch.no_grad(), _evaluating(model):
        assignment, heat = _assignment_and_heat(model, first, image)
        # Without "height" and "width" the boxes stay in pixels of this image.
        found = model([{"image": first["image"]}])[0]["instances"].to("cpu")
    shown, title = _best(found, max_detections)
    truth = draw_objects(image, boxes, classes, class_names, scale=scale)
    shown = draw_objects(
        image, shown.pred_boxes.tensor.numpy(), shown.pred_classes, class_names, shown.scores, scale
    )
    return {
        "ground_truth": contact_sheet([[truth]], [f"ground truth, {len(classes)} objects"]),
        "assignment": assignment,
        "heat": heat,
        "detections": contact_sheet([[shown]], [title]),
    }


def _best(found: Instances, most: int) -> tuple[Instances, str]:
    """The best detections of those that score enough to be shown, and the words for them."""
    limit = f"a score of {DETECTION_THRESHOLD} or more"
    enough = found[found.scores >= DETECTION_THRESHOLD]
    best = enough[enough.scores.argsort(descending=True, stable=True)[:most]]
    if len(best) < len(enough):
        return best, f"the best {len(best)} of {len(enough)} detections with {limit}"
    if len(found) and not len(enough):
        return best, f"no detection with {limit}; the best has {found.scores.max():.2f}"
    return best, f"{len(best)} detections with {limit}"


def _assignment_and_heat(
    model: nn.Module, inputs: Mapping, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures of one image, by the model's own levels and rules."""
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    levels, predictions = model.levels(features, images), model.head(features)
    truth = inputs["instances"].to(images.tensor.device)
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


# ---- sheets ----


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    titles: Sequence[str] = (),
    heading: str = "",
    captions: Sequence[Sequence[str]] | None = None,
    group: int = 1,
) -> np.ndarray:
    """A grid of pictures on white paper.

    Args:
        rows: uint8 [h, w, 3] pictures, or None for an empty place; sizes may differ.
        titles: above the columns.
        heading: above everything.
        captions: below the pictures; the same layout as ``rows``.
        group: that many columns belong together: the gutter behind them is wider.

    Returns:
        uint8 [h, w, 3]: gutters of ``GUTTER`` pixels (three times that between groups) and around.
    """
    font, large = _font(13), _font(17)
    columns = max((len(row) for row in rows), default=0)
    widths = [max((_width(row, i) for row in rows), default=0) for i in range(columns)]
    heights = [max((p.shape[0] for p in row if p is not None), default=0) for row in rows]
    gaps = [GUTTER * (3 if (i + 1) % group == 0 and group > 1 else 1) for i in range(columns)]
    lefts = [GUTTER + sum(widths[:i]) + sum(gaps[:i]) for i in range(columns)]
    width = GUTTER + sum(widths) + sum(gaps[:-1]) + GUTTER
    top = GUTTER + (30 if heading else 0) + (22 if titles else 0)
    below = GUTTER + (20 if captions else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + below * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GUTTER, GUTTER + 14), heading, fill=INK, font=large, anchor="lm")
    for left, title, room in zip(lefts, titles, widths, strict=False):
        draw.text((left, top - 12), _fit(title, font, room), fill=INK, font=font, anchor="lm")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (lefts[j], top))
            if captions:
                text = _fit(captions[i][j], font, widths[j])
                draw.text(
                    (lefts[j], top + heights[i] + 11), text, fill=GREY, font=font, anchor="lm"
                )
        top += heights[i] + below
    return np.asarray(sheet)


def _width(row: Sequence[np.ndarray | None], index: int) -> int:
    return 0 if index >= len(row) or row[index] is None else row[index].shape[1]


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """``text``, shortened where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along: the same letters on every machine."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def _resize(image: np.ndarray, scale: float) -> Image.Image:
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _factors(image: np.ndarray, canvas: Image.Image) -> np.ndarray:
    """[4]: what boxes of ``image`` are multiplied by to be boxes of ``canvas``."""
    return np.array([canvas.width / image.shape[1], canvas.height / image.shape[0]] * 2)


def _as_array(values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _clamp(value: float, low: int, high: int) -> int:
    return min(max(round(value), low), high)


def _contrast(color: Color) -> Color:
    """Black on light colours, white on dark ones (WCAG's relative luminance, gamma simplified)."""
    red, green, blue = ((v / 255) ** 2.2 for v in color)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else PAPER
