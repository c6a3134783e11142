"""Draws boxes with names and scores, in a distinct color for each class.

Images are uint8 [H, W, 3] arrays, RGB; boxes are xyxy in pixels of their image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

Color = tuple[int, int, int]

# The seven colors of Okabe and Ito (jfly.uni-koeln.de/color), and then those with the largest
# distance to all previous ones in OKLab, also in color blindness (Machado et al., 2009).
PALETTE: tuple[Color, ...] = tuple(map(ImageColor.getrgb, (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00",
    "#cc79a7", "#882255", "#6ef5eb", "#6928f0", "#7dd778", "#73500a",
)))  # fmt: skip
GRAY: Color = (150, 150, 150)
PANEL_SIDE = 320  # pixels; smaller images are enlarged to fit their labels


def class_color(index: int) -> Color:
    """Returns the color of class ``index``; gray for -1, an ignored region."""
    if index < len(PALETTE):
        return GRAY if index < 0 else PALETTE[index]
    # More colors cannot all be distinct, but the golden angle separates consecutive hues.
    step = index - len(PALETTE)
    return ImageColor.getrgb(
        f"hsl({(29 + 222.49 * step) % 360:.2f}, 75%, {(45, 62, 78)[step % 3]}%)"
    )


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    class_names: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    scale: float = 1.0,
) -> np.ndarray:
    """Draws boxes with the names and colors of their classes; class -1 is an ignored region."""
    classes = [int(c) for c in classes]
    known = len(class_names or ())
    names = [class_names[c] if 0 <= c < known else "ignored" if c < 0 else str(c) for c in classes]
    return draw_boxes(image, boxes, names, scores, [class_color(c) for c in classes], scale)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    colors: Sequence[Color] | None = None,
    scale: float = 1.0,
) -> np.ndarray:
    """Draws boxes and labels on a copy of the image.

    Args:
        image: uint8 [H, W, 3], RGB.
        boxes: [N, 4], xyxy in pixels of ``image``; boxes that are not finite are left out.
        labels: N strings.
        scores: N numbers in [0, 1], appended to the labels; the best box is drawn on top.
        colors: N colors; None to draw all boxes in the same color.
        scale: factor by which the image, but not lines and text, is enlarged.

    Returns:
        uint8 [round(H * scale), round(W * scale), 3], RGB.
    """
    canvas = enlarge(image, scale)
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4) * box_scale(image, canvas)
    colors = [PALETTE[0]] * len(boxes) if colors is None else colors
    scores = None if scores is None else np.asarray(scores)
    order = np.arange(len(boxes)) if scores is None else scores.argsort(kind="stable")
    order = order[np.isfinite(boxes[order]).all(axis=1)]
    draw = ImageDraw.Draw(canvas, "RGBA")
    width = _clamp(min(canvas.size) / 160, 1, 3)
    for i in order:
        # The line is centered on the border, so that small objects stay visible.
        x0, y0, x1, y1 = pixel_box(boxes[i], canvas.size, width // 2)
        around = (x0 - 1, y0 - 1, x1 + 1, y1 + 1)
        draw.rectangle(around, outline=(*_contrast(colors[i]), 120), width=width + 2)
        draw.rectangle((x0, y0, x1, y1), outline=tuple(colors[i]), width=width)
    drawn: list[tuple[float, float, float, float]] = []
    for i in order[::-1]:  # the label of the best box is placed first
        text = [] if labels is None else [str(labels[i])]
        text += [] if scores is None else [f"{scores[i]:.2f}"]
        if text:
            _draw_label(draw, canvas.size, boxes[i], " ".join(text), colors[i], boxes, drawn)
    return np.asarray(canvas)


def _draw_label(draw, size, box, text: str, color: Color, boxes, drawn) -> None:
    """Draws a label where it overlaps least with other labels and boxes; adds it to ``drawn``."""
    font = load_font(_clamp(min(size) / 27, 10, 15))
    width, height = math.ceil(font.getlength(text)) + 5, round(font.size) + 3
    x0, y0, x1, y1 = pixel_box(box, size, 1)
    corners = [(x, y) for y in (y0 - height, y1 + 1) for x in (x0, x1 + 1 - width)]
    corners += [(x1 + 1, y0), (x0 - width, y0), (x0, y0)]
    obstacles = np.concatenate([np.reshape(drawn, (-1, 4)), boxes])
    weight = np.array([10.0] * len(drawn) + [1.0] * len(boxes))

    def overlap(corner: tuple[int, int]) -> float:
        label = np.array([*corner, corner[0] + width, corner[1] + height])
        sides = np.minimum(obstacles[:, 2:], label[2:]) - np.maximum(obstacles[:, :2], label[:2])
        return float((np.nan_to_num(sides).clip(0).prod(axis=1) * weight).sum())

    limit = (max(0, size[0] - width), max(0, size[1] - height))
    corners = [(_clamp(x, 0, limit[0]), _clamp(y, 0, limit[1])) for x, y in corners]
    x, y = min(corners, key=overlap)
    drawn.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=tuple(color))
    draw.text((x + 3, y + height / 2), text, fill=_contrast(color), font=font, anchor="lm")


def pixel_box(box: np.ndarray, size: tuple[int, int], margin: int) -> tuple[int, int, int, int]:
    """Returns the first and last column and row of a box with a margin, clipped to the image."""
    limit = np.array(size) - 1
    first = (np.rint(box[:2]) - margin).clip(0, limit)
    last = (np.rint(box[2:]) - 1 + margin).clip(0, limit)
    return tuple(int(v) for v in (*first, *np.maximum(first, last)))


def enlarge(image: np.ndarray, scale: float) -> Image.Image:
    """Returns the image enlarged by ``scale``, with at least one pixel."""
    canvas = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    size = [max(1, round(side * scale)) for side in canvas.size]
    return canvas.resize(size, Image.Resampling.BICUBIC)


def box_scale(image: np.ndarray, canvas: Image.Image) -> np.ndarray:
    """Returns the factors [4] that convert boxes in ``image`` to boxes in ``canvas``."""
    return np.array([canvas.width / image.shape[1], canvas.height / image.shape[0]] * 2)


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Loads the font that ships with matplotlib."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def _clamp(value: float, low: int, high: int) -> int:
    return min(max(round(value), low), high)


def _contrast(color: Color) -> Color:
    """Returns black for light colors and white for dark ones, by WCAG's relative luminance."""
    luminance = np.dot([0.2126, 0.7152, 0.0722], (np.array(color) / 255) ** 2.2)
    return (0, 0, 0) if luminance > 0.18 else (255, 255, 255)
