"""Builds the content of a COCO file from annotations of other formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ...errors import format_value
from ..defects import parse_side

Shape = list[float] | tuple[list[float], list[float] | None]  # box, or box and polygon
UNSIZED = "unsized"  # key of images whose format does not record the size


class Source(NamedTuple):
    """An annotation file converted to COCO, not yet reviewed."""

    file: str  # name in messages
    image_root: str  # folder to which image names are relative
    content: dict


class Builder:
    """Collects images and objects, including invalid ones, which the review reports.

    Args:
        classes: class names in order; None uses the sorted names of all objects.
    """

    def __init__(self, classes: Iterable[str] | None = None):
        self._classes = None if classes is None else list(classes)
        self._images, self._objects, self._added_classes = [], [], set()

    def add_image(self, file_name: str, width: object = None, height: object = None) -> int:
        """Adds an image and returns its id; a size of None is read from the file later."""
        entry = {"id": len(self._images) + 1, "file_name": file_name}
        if width is None:
            entry[UNSIZED] = True
        else:
            entry |= {"width": parse_side(width), "height": parse_side(height)}
        self._images.append(entry)
        return entry["id"]

    def add_classes(self, names: Iterable[str]) -> None:
        """Adds classes that may have no objects."""
        self._added_classes.update(names)

    def add_broken_image(self, problem: str) -> None:
        """Adds an unusable image."""
        self._images.append({"broken": problem})

    def add_object(
        self,
        image: int,
        label: object,
        box: Sequence | None,
        place: str,
        *,
        crowd: object = 0,
        polygon: Sequence[float] | None = None,
    ) -> None:
        """Adds an object.

        Args:
            image: id of the image.
            label: class name.
            box: [x, y, width, height].
            place: position for messages.
            crowd: value of ``iscrowd``.
            polygon: alternating x and y of the points.
        """
        entry = {"image_id": image, "label": label, "bbox": box, "iscrowd": crowd, "place": place}
        if polygon is not None:
            entry["segmentation"] = [list(polygon)]
        self._objects.append(entry)

    def add_broken_object(self, image: int, problem: str, place: str) -> None:
        """Adds an unusable object."""
        self._objects.append({"image_id": image, "broken": problem, "place": place})

    def add_shape(
        self, image: int, label: object, shape: object, to_box: Callable[..., Shape], place: str
    ) -> None:
        """Adds an object with the box, or box and polygon, that ``to_box`` returns for a shape."""
        try:
            converted = to_box(shape)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            self.add_broken_object(image, f"{format_value(shape)} is not a shape with a box", place)
            return
        box, polygon = converted if isinstance(converted, tuple) else (converted, None)
        self.add_object(image, label, box, place, polygon=polygon)

    def content(self) -> dict:
        """Returns the content of a COCO file with the added images and objects."""
        labels = {o["label"] for o in self._objects if isinstance(o.get("label"), str)}
        labels = {label.strip() for label in labels | self._added_classes} - {""}
        names = sorted(labels) if self._classes is None else self._classes
        ids = {name: number for number, name in enumerate(names, 1)}
        for number, entry in enumerate(self._objects, 1):
            label = entry.pop("label", None)
            entry["id"] = number
            if isinstance(label, str) and label.strip():
                entry["category_id"] = ids.get(label.strip(), label)
            elif "broken" not in entry:
                entry["broken"] = "the class name is missing; add it"
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        return {"images": self._images, "categories": categories, "annotations": self._objects}


def enclosing_box(points: Iterable[Sequence[float]]) -> list[float]:
    """Returns the bounding box [x, y, width, height] of points."""
    xs, ys = zip(*((float(x), float(y)) for x, y in points), strict=True)
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def rotated_box(
    box: Sequence[float], degrees: float, pivot: tuple[float, float] = (0.5, 0.5)
) -> list[float]:
    """Returns the bounding box [x, y, width, height] of a rotated box.

    Args:
        box: [x, y, width, height] before the rotation.
        degrees: clockwise angle.
        pivot: center of rotation, as fractions of width and height.
    """
    x, y, width, height = box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    center = x + pivot[0] * width, y + pivot[1] * height
    corners = [(u - pivot[0], v - pivot[1]) for u in (0, 1) for v in (0, 1)]
    return enclosing_box(
        (
            center[0] + cos * u * width - sin * v * height,
            center[1] + sin * u * width + cos * v * height,
        )
        for u, v in corners
    )
