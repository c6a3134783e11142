"""Boxes with names and scores, in colors that stay apart.

Images are uint8 [H, W, 3] arrays, RGB; boxes are xyxy in pixels of their image. Nothing in this
package opens a window, keeps state or needs a display.
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

# The seven colors of Okabe and Ito (jfly.uni-koeln.de/color), continued by those that are furthest
# from all before them in OKLab, also as seen without red or green cones (Machado et al., 2009).
PALETTE: tuple[Color, ...] = tuple(map(ImageColor.getrgb, (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00",
    "#cc79a7", "#882255", "#6ef5eb", "#6928f0", "#7dd778", "#73500a",
)))  # fmt: skip
GRAY: Color = (150, 150, 150)
PANEL_SIDE = 320  # a smaller image is enlarged, so that its labels have room


def class_color(index: int) -> Color:
    """The color of class ``index``; gray for -1, the regions to ignore."""
    if index < len(PALETTE):
        return GRAY if index < 0 else PALETTE[index]
    # Beyond what eyes can name, neighbors at least differ: the golden angle spreads the hues.
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
    """``draw_boxes`` with the name and the color of each box's class; -1 is a region to ignore."""
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
    """Draws thin boxes, each with a small tag, over the enlarged image.

    Args:
        image: uint8 [H, W, 3], RGB; not changed.
        boxes: [N, 4], xyxy in pixels of ``image``; one that is not finite is left out.
        labels: N strings.
        scores: N numbers in [0, 1], written behind the labels; the best box is drawn on top.
        colors: N colors; all boxes alike where None.
        scale: enlargement of the image; lines and letters are not enlarged with it.

    Returns:
        uint8 [round(H * scale), round(W * scale), 3], RGB.
    """
    canvas = resize(image, scale)
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4) * factors(image, canvas)
    colors = [PALETTE[0]] * len(boxes) if colors is None else colors
    scores = None if scores is None else np.asarray(scores)
    order = np.arange(len(boxes)) if scores is None else scores.argsort(kind="stable")
    order = order[np.isfinite(boxes[order]).all(axis=1)]
    draw = ImageDraw.Draw(canvas, "RGBA")
    width = _clamp(min(canvas.size) / 160, 1, 3)
    for i in order:
        # The line straddles the border, so that small objects stay visible.
        x0, y0, x1, y1 = pixels(boxes[i], canvas.size, width // 2)
        around = (x0 - 1, y0 - 1, x1 + 1, y1 + 1)
        draw.rectangle(around, outline=(*_contrast(colors[i]), 120), width=width + 2)
        draw.rectangle((x0, y0, x1, y1), outline=tuple(colors[i]), width=width)
    tags = [[] if labels is None else [str(labels[i])] for i in range(len(boxes))]
    tags = [t + ([] if scores is None else [f"{scores[i]:.2f}"]) for i, t in enumerate(tags)]
    taken: list[tuple[float, float, float, float]] = []
    for i in order[::-1]:  # the best box chooses the place of its tag first
        if tags[i]:
            _draw_tag(draw, canvas.size, boxes[i], " ".join(tags[i]), colors[i], boxes, taken)
    return np.asarray(canvas)


def _draw_tag(draw, size, box, text: str, color: Color, boxes, taken) -> None:
    """Writes ``text`` where it covers least, of seven places at the box; adds that to ``taken``."""
    font = load_font(_clamp(min(size) / 27, 10, 15))
    width, height = math.ceil(font.getlength(text)) + 5, round(font.size) + 3
    x0, y0, x1, y1 = pixels(box, size, 1)
    places = [(x, y) for y in (y0 - height, y1 + 1) for x in (x0, x1 + 1 - width)]
    places += [(x1 + 1, y0), (x0 - width, y0), (x0, y0)]
    rivals = np.concatenate([np.reshape(taken, (-1, 4)), boxes])
    weight = np.array([10.0] * len(taken) + [1.0] * len(boxes))

    def covered(place: tuple[int, int]) -> float:
        tag = np.array([*place, place[0] + width, place[1] + height])
        sides = np.minimum(rivals[:, 2:], tag[2:]) - np.maximum(rivals[:, :2], tag[:2])
        return float((np.nan_to_num(sides).clip(0).prod(axis=1) * weight).sum())

    room = (max(0, size[0] - width), max(0, size[1] - height))
    places = [(_clamp(x, 0, room[0]), _clamp(y, 0, room[1])) for x, y in places]
    x, y = min(places, key=covered)
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=tuple(color))
    draw.text((x + 3, y + height / 2), text, fill=_contrast(color), font=font, anchor="lm")


def pixels(box: np.ndarray, size: tuple[int, int], outside: int) -> tuple[int, int, int, int]:
    """First and last column and row of a box grown by ``outside``, kept inside the image."""
    limit = np.array([*size, *size]) - 1
    first = (np.rint(box[:2]) - outside).clip(0, limit[:2])
    last = (np.rint(box[2:]) - 1 + outside).clip(0, limit[2:])
    return tuple(int(v) for v in (*first, *np.maximum(first, last)))


def resize(image: np.ndarray, scale: float) -> Image.Image:
    """The image, enlarged by ``scale``; at least one pixel."""
    canvas = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    size = [max(1, round(side * scale)) for side in canvas.size]
    return canvas.resize(size, Image.Resampling.BICUBIC)


def factors(image: np.ndarray, canvas: Image.Image) -> np.ndarray:
    """[4]: what boxes of ``image`` are multiplied by to be boxes of ``canvas``."""
    return np.array([canvas.width / image.shape[1], canvas.height / image.shape[0]] * 2)


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The font that ships with matplotlib: the same letters on every machine."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def _clamp(value: float, low: int, high: int) -> int:
    return min(max(round(value), low), high)


def _contrast(color: Color) -> Color:
    """Black on light colors, white on dark ones (WCAG's relative luminance, gamma simplified)."""
    luminance = np.dot([0.2126, 0.7152, 0.0722], (np.array(color) / 255) ** 2.2)
    return (0, 0, 0) if luminance > 0.18 else (255, 255, 255)
