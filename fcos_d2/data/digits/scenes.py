"""Composes the images of the ``digits`` datasets: handwritten digits on a cluttered background.

The digits come from scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test
set: 1,797 images of 8 x 8 pixels, by 13 writers. A scene is a 160 x 160 RGB image of 0 to 5 digits,
whose longer sides are 16 to 80 pixels. ``files.py`` writes the files.

Arrays: an image is ``[H, W, 3]``, an ink mask is ``[h, w]`` in [0, 1], boxes are xyxy in pixels.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 160
INK_LENGTHS = (16, 80)  # longer side of a digit, in pixels
MAX_DIGITS = 5
EMPTY_IMAGES = 0.04  # fraction of images without digits
MAX_COVERED = 0.35  # fraction of a digit's box that later digits may cover
VISIBLE = 0.3  # minimum ink inside the box; weaker ink is the soft edge of a stroke
VAL_SHARE = 0.2  # fraction of the handwritten digits of each class
LUMA = np.float32([0.299, 0.587, 0.114])


class Handwriting(NamedTuple):
    """Handwritten digits from which scenes are composed."""

    inks: np.ndarray  # [N, 16, 16] float32, about 0 to 1: sharpened, with a margin of 4 pixels
    labels: np.ndarray  # [N] int64, 0 to 9
    sources: np.ndarray  # [N] int64, scikit-learn's indices


class Scene(NamedTuple):
    """One image and its digits, in the order in which they were drawn."""

    image: np.ndarray  # [160, 160, 3] uint8, RGB
    boxes: np.ndarray  # [n, 4] int64, tight boxes, including ink that later digits cover
    labels: np.ndarray  # [n] int64
    sources: np.ndarray  # [n] int64


def load_handwriting(split: str, seed: int) -> Handwriting:
    """Loads the handwritten digits of ``split`` ("train" or "val"); the splits are disjoint."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    chosen = split_indices(digits.target, split, seed)
    inks, labels = digits.images[chosen] / 16, digits.target[chosen]
    return Handwriting(_sharpen(inks), labels.astype(np.int64), chosen)


def _sharpen(inks: np.ndarray) -> np.ndarray:
    """Adds a margin of 4 pixels to ``[N, 8, 8]``, and sharpens loops and strokes.

    Applies unsharp masking with a Gaussian of 1.3 pixels.
    """
    inks = np.pad(inks, ((0, 0), (4, 4), (4, 4)))
    position = np.arange(16)
    blur = np.exp(-(((position[:, None] - position) / 1.3) ** 2) / 2)
    blur /= blur.sum(1, keepdims=True)
    return (inks + 1.5 * (inks - blur @ inks @ blur.T)).astype(np.float32)


def split_indices(labels: np.ndarray, split: str, seed: int) -> np.ndarray:
    """Returns the indices of ``labels`` in ``split``, with the same fraction of every class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        num_val = round(VAL_SHARE * len(members))
        chosen.append(members[:num_val] if split == "val" else members[num_val:])
    return np.sort(np.concatenate(chosen))


def compose_scene(handwriting: Handwriting, rng: np.random.Generator) -> Scene:
    """Draws a random scene."""
    canvas = _add_clutter(_draw_background(rng), rng)
    num_digits = 0 if rng.random() < EMPTY_IMAGES else int(rng.integers(1, MAX_DIGITS + 1))
    boxes, covered, chosen = np.zeros((0, 4), np.int64), np.zeros(0), []
    for _ in range(num_digits):
        index = int(rng.integers(len(handwriting.labels)))
        length = int(rng.integers(INK_LENGTHS[0], INK_LENGTHS[1] + 1))
        ink = enlarge_ink(handwriting.inks[index], length, rng)
        box = _find_free_box(ink.shape, boxes, covered, rng)
        if box is None:
            continue
        _paint(canvas, ink, box, rng)
        covered = np.append(covered + _covered_share(boxes, box), 0.0)
        boxes = np.concatenate([boxes, box[None]])
        chosen.append(index)
    canvas += rng.normal(0, rng.uniform(3, 14), (SIZE, SIZE, 1)).astype(np.float32)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(image, boxes, handwriting.labels[chosen], handwriting.sources[chosen])


def enlarge_ink(ink: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Enlarges a 16 x 16 ink mask to a longer side of ``length``, with a slight affine distortion.

    Returns:
        float32 ``[h, w]`` in [0, 1], cropped to ink of at least ``VISIBLE``.
    """
    large = Image.fromarray(ink).resize((192, 192), Image.Resampling.BICUBIC)
    angle, shear = rng.uniform(-0.17, 0.17), rng.uniform(-0.15, 0.15)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b, d, e = cos, cos * shear - sin, sin, sin * shear + cos
    matrix = (a, b, 96 * (1 - a - b), d, e, 96 * (1 - d - e))
    large = large.transform(large.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    # A soft threshold sharpens strokes; a lower level makes them thicker.
    level, softness = rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.45)
    stroke = np.clip((np.asarray(large) - level) / softness + 0.5, 0, 1)
    stroke = _crop_to_ink(stroke)
    height, width = stroke.shape
    width *= np.exp(rng.uniform(-0.18, 0.18))
    scale = length / max(height, width)
    size = (max(3, round(width * scale)), max(3, round(height * scale)))
    small = Image.fromarray(stroke.astype(np.float32)).resize(size, Image.Resampling.BOX)
    return _crop_to_ink(np.asarray(small))


def _crop_to_ink(ink: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero((ink >= VISIBLE).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _find_free_box(ink_shape, boxes, covered, rng) -> np.ndarray | None:
    """Returns a random box that does not cover too much of earlier digits, or None."""
    height, width = ink_shape
    for _ in range(30):
        x, y = rng.integers(0, SIZE - width + 1), rng.integers(0, SIZE - height + 1)
        box = np.array([x, y, x + width, y + height])
        if (covered + _covered_share(boxes, box) <= MAX_COVERED).all():
            return box
    return None


def _covered_share(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Returns the fraction ``[n]`` of the area of each of ``boxes`` that ``box`` covers."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    return np.clip(sides, 0, None).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _paint(canvas: np.ndarray, ink: np.ndarray, box: np.ndarray, rng: np.random.Generator) -> None:
    """Blends ``ink`` into ``canvas`` with a gradient of two colors that contrast with it."""
    x0, y0, x1, y1 = box
    under = canvas[y0:y1, x0:x1]
    opacity = rng.uniform(0.75, 1)
    color = _contrasting_color(under[ink >= VISIBLE], rng.uniform(45, 100) / opacity, rng)
    second = np.clip(color + rng.normal(0, 22, 3), 0, 255)
    ramp = _ramp(ink.shape, rng)[..., None]
    weight = ink[..., None] * opacity
    under += weight * (color + ramp * (second - color) - under)


def _contrasting_color(under: np.ndarray, contrast: float, rng) -> np.ndarray:
    """Returns a random color whose luma differs by ``contrast`` from most pixels ``[n, 3]``."""
    colors = rng.uniform(0, 255, (24, 3)).astype(np.float32)
    colors = np.concatenate([colors, np.float32([[8, 8, 8], [247, 247, 247]])])
    difference = np.abs((colors @ LUMA)[:, None] - under @ LUMA)  # [26, n]
    shown = (difference >= contrast).mean(1)
    enough = np.flatnonzero(shown >= 0.93)
    return colors[enough[0] if len(enough) else shown.argmax()]


def _ramp(shape, rng: np.random.Generator) -> np.ndarray:
    """Returns a gradient ``[h, w]`` from 0 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1])
    slope = np.cos(angle) * x + np.sin(angle) * y[:, None]
    return (0.5 + 0.5 * slope / np.sqrt(2)).astype(np.float32)


def _draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draws a color gradient with soft blotches, float32 ``[160, 160, 3]``."""
    near = rng.uniform(25, 230, 3)
    near = near.mean() + rng.uniform(0.2, 1) * (near - near.mean())  # from gray to bright
    far = np.clip(near + rng.normal(0, 38, 3), 10, 245)
    ground = near + _ramp((SIZE, SIZE), rng)[..., None] * (far - near)
    cells = int(rng.integers(3, 12))
    blotches = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    blotches = blotches.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return (ground + rng.uniform(2, 16) * np.asarray(blotches)[..., None]).astype(np.float32)


def _add_clutter(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws transparent lines, rectangles, ellipses and scribbles that do not look like digits."""
    image = Image.fromarray(np.clip(background, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(2, 11)):
        shape = (_line, _rectangle, _ellipse, _scribble)[rng.integers(4)]
        color = (*(int(c) for c in rng.integers(0, 256, 3)), int(rng.integers(50, 150)))
        shape(draw, color, rng)
    return np.asarray(image).astype(np.float32)


def _line(draw, color, rng) -> None:
    """Draws a line longer than any stroke of a digit, so that it does not look like a one."""
    start, angle = rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(90, 200) * np.array([np.cos(angle), np.sin(angle)])
    draw.line([*(start - reach / 2), *(start + reach / 2)], color, int(rng.integers(1, 4)))


def _rectangle(draw, color, rng) -> None:
    corner, sides = rng.uniform(-20, SIZE, 2), rng.uniform(8, 70, 2)
    style = {"outline" if rng.random() < 0.4 else "fill": color}
    draw.rectangle([*corner, *(corner + sides)], width=int(rng.integers(1, 4)), **style)


def _ellipse(draw, color, rng) -> None:
    """Draws a filled ellipse, as an outline would look like a zero."""
    corner, sides = rng.uniform(-20, SIZE, 2), rng.uniform(8, 60, 2)
    draw.ellipse([*corner, *(corner + sides)], fill=color)


def _scribble(draw, color, rng) -> None:
    """Draws a thin zigzag line with more turns than a digit."""
    steps = rng.normal(0, rng.uniform(5, 14), (int(rng.integers(8, 18)), 2))
    points = rng.uniform(10, SIZE - 10, 2) + np.cumsum(steps, 0)
    draw.line([tuple(p) for p in points], color, int(rng.integers(1, 3)))
