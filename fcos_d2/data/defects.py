"""Lists the defects that annotations can have, and repairs single values.

Unambiguous defects are repaired in memory whenever data is loaded. Training stops at the first
other defect; ``fcos-d2 check`` lists all of them. ``review.py`` reviews COCO files, and
``records.py`` checks records registered in Python against the same limits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple

import numpy as np

from ..errors import format_value

HUGE = 2.0**62  # bound of coordinates, whose sums must be below 2^63, the limit of int64
MARGIN = 1.0  # pixels by which a box may exceed its image
SIZE_TOLERANCE = 0.01  # relative difference in size that rounding explains
BOX_FORMAT = "[x, y, width, height]"


class Defect(NamedTuple):
    """Describes a kind of defect."""

    what: str  # noun phrase that follows a number
    repair: str | None = None  # None if the defect is ambiguous


DEFECTS = {
    # Files.
    "same category": Defect("duplicate categories", "merged"),
    "same image": Defect("duplicate images", "merged"),
    "same annotation": Defect("duplicate annotations", "merged"),
    "class name": Defect("class names with surrounding whitespace, or not strings", "fixed"),
    "id": Defect("annotations without a unique id", "renumbered"),
    "reference": Defect("references whose type differs from the id's", "matched"),
    "entry": Defect("incomplete entries"),
    "corners": Defect("boxes written as [x1, y1, x2, y2]", "converted to [x, y, width, height]"),
    # Images.
    "path": Defect("images that are not at file_name", "found by the end of the path"),
    "no size": Defect("images without a valid width and height", "read from the files"),
    "size": Defect("images whose size differs from the annotated one", "read from the files"),
    "image": Defect("unusable images"),
    # Annotations.
    "number": Defect("boxes and sizes written as strings", "converted"),
    "no box": Defect("annotations without a valid bbox", "computed from polygons"),
    "negative": Defect("boxes with negative width or height", "corners swapped"),
    "flag": Defect("iscrowd written as a string", "converted"),
    "ignore": Defect("annotations with 'ignore'", "treated as crowd regions"),
    "image_id": Defect("annotations of unknown images"),
    "category_id": Defect("annotations of unknown classes"),
    "box": Defect("annotations with an invalid bbox"),
    "iscrowd": Defect("annotations with an invalid iscrowd"),
    "mask": Defect("annotations with an invalid segmentation"),
}


class DefectError(Exception):
    """Raised for a defect that cannot be repaired.

    Args:
        kind: key of ``DEFECTS``.
        cause: what is wrong and how to fix it.
    """

    def __init__(self, kind: str, cause: str):
        super().__init__(cause)
        self.kind = kind


class Problem(NamedTuple):
    """A defect that was not repaired."""

    kind: str  # key of DEFECTS
    text: str  # where it is, what is wrong and how to fix it


def describe_repairs(repaired: Counter) -> list[str]:
    """Returns one line for each kind of repair."""
    return [
        f"{count} {DEFECTS[kind].what}: {DEFECTS[kind].repair}" for kind, count in repaired.items()
    ]


# ---- Boxes ----


def repair_box(
    box: object, mask: object, size: tuple[float, float], repaired: Counter
) -> list[float]:
    """Validates a bounding box, and repairs it if necessary.

    Args:
        box: value of ``bbox``.
        mask: value of ``segmentation``, used if the box is invalid.
        size: width and height of the image.
        repaired: counts the repairs.

    Returns:
        [x, y, width, height].

    Raises:
        DefectError: the box cannot be repaired.
    """
    try:
        return _swap_corners(_parse_box(box, repaired), size, repaired)
    except DefectError:
        enclosing = box_of_polygons(mask)
        if enclosing is None:
            raise
        repaired["no box"] += 1
        return enclosing


def _parse_box(box: object, repaired: Counter) -> list[float]:
    if box is None:
        raise DefectError("box", f"bbox is missing; add {BOX_FORMAT} or remove the annotation")
    values = box if isinstance(box, list) else []
    numbers = [_parse_number(value) for value in values]
    if len(numbers) != 4 or None in numbers:
        raise DefectError("box", f"bbox must be numbers {BOX_FORMAT}, got {format_value(box)}")
    if not all(abs(number) < HUGE for number in numbers):
        text = f"bbox must be finite, got {format_value(box)}; correct or remove the annotation"
        raise DefectError("box", text)
    repaired["number"] += any(isinstance(value, str) for value in values)
    return numbers


def _parse_number(value: object) -> float | None:
    """Returns a number or the number in a string, or None for other values."""
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, Real) else None


def _swap_corners(box: list[float], size: tuple[float, float], repaired: Counter) -> list[float]:
    """Makes width and height nonnegative."""
    x, y, width, height = box
    if width >= 0 and height >= 0:
        return box
    (left, right), (top, bottom) = sorted((x, x + width)), sorted((y, y + height))
    if min(left, top) < -MARGIN or right > size[0] + MARGIN or bottom > size[1] + MARGIN:
        raise DefectError(
            "box",
            f"bbox {format_value(box)} has a negative size and exceeds the image if its corners "
            f"are swapped; it must be {BOX_FORMAT}",
        )
    repaired["negative"] += 1
    return [left, top, abs(width), abs(height)]


def is_written_as_corners(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Returns whether boxes fit their images only as [x1, y1, x2, y2].

    Args:
        boxes: [n, 4], annotated as [x, y, width, height].
        sizes: [n, 2], width and height of the image of each box.
    """
    if not len(boxes):
        return False
    fits = (boxes[:, 2:] >= boxes[:, :2]).all(1) & (boxes[:, 2:] <= sizes + MARGIN).all(1)
    exceeds = (boxes[:, :2] + boxes[:, 2:] > sizes + 2 * MARGIN).any(1)
    # About 75 percent of corners exceed the image if taken as width and height.
    return bool(fits.mean() > 0.99 and exceeds.mean() > 0.25)


# ---- Masks ----


def is_run_lengths(mask: object) -> bool:
    """Returns whether a mask is in COCO's run-length encoding, compressed or not."""
    if not isinstance(mask, dict):
        return False
    counts, size = mask.get("counts"), mask.get("size")
    return isinstance(counts, str) or _are_counts(counts) and _are_counts(size) and len(size) == 2


def is_polygons(mask: object) -> bool:
    """Returns whether a mask is a list of lists."""
    return isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and 0 <= value < 2**31 for value in values
    )


def box_of_polygons(mask: object) -> list[float] | None:
    """Returns the bounding box [x, y, width, height] of polygons, or None if they are invalid."""
    if isinstance(mask, list) and all(isinstance(value, Real) for value in mask):
        mask = [mask]  # a single polygon
    if not is_polygons(mask):
        return None
    polygons = [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
    values = [value for polygon in polygons for value in polygon]
    if not values or not all(isinstance(v, Real) and abs(v) < HUGE for v in values):
        return None
    points = np.array(values, float).reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *(high - low).tolist()]


# ---- Flags ----


def repair_flag(value: object, repaired: Counter) -> int:
    """Converts ``iscrowd`` to 0 or 1; None means 0.

    Raises:
        DefectError: the value is invalid.
    """
    if value is None:
        return 0
    if isinstance(value, str) and value.strip().lower() in FLAGS:
        repaired["flag"] += 1
        return FLAGS[value.strip().lower()]
    if isinstance(value, (int, float)) and value in (0, 1):
        return int(value)
    raise DefectError("iscrowd", f"iscrowd must be 0 or 1, got {format_value(value, quote=True)}")


FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "": 0}


# ---- Image sizes ----


def parse_side(value: object) -> int | None:
    """Converts a width or height, which may be a string or float; returns None if it is invalid."""
    number = _parse_number(value)
    if number is None or isinstance(value, bool) or not 1 <= number < 2**31:
        return None
    return int(number) if number == int(number) else None


def check_size(
    annotated: tuple[int, int],
    actual: tuple[int, int],
    stored: tuple[int, int],
    corners: Iterable[tuple[float, float]],
) -> None:
    """Checks that the boxes of an image fit it although its size differs from the annotated one.

    Args:
        annotated: width and height in the annotations.
        actual: width and height of the image as it is read.
        stored: width and height before the EXIF orientation is applied.
        corners: x2, y2 of every box.

    Raises:
        DefectError: the boxes may refer to a different size.
    """
    text = f"it has {actual[0]} x {actual[1]} pixels, but is annotated with {annotated[0]} x "
    text += f"{annotated[1]}"
    if annotated == stored:
        raise DefectError(
            "image",
            f"{text}, its size before the EXIF orientation is applied; set upright: false in "
            "DATASETS.REGISTER if the boxes were drawn on the stored pixels",
        )
    scale = actual[0] / annotated[0], actual[1] / annotated[1]
    if math.isclose(*scale, rel_tol=SIZE_TOLERANCE) and abs(scale[0] - 1) > SIZE_TOLERANCE:
        raise DefectError("image", f"{text}: it was resized by {scale[0]:.3g} after annotation")
    if any(x > actual[0] + MARGIN or y > actual[1] + MARGIN for x, y in corners):
        swapped = ", with width and height swapped" if annotated == actual[::-1] else ""
        raise DefectError("image", f"{text}{swapped}, and the boxes do not fit; replace the image")
