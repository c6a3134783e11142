"""Builds the content of a COCO file from other formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ...errors import format_value
from ..defects import usable_side

Boxes = list[float] | tuple[list[float], list[float] | None]  # a box; perhaps with a polygon
UNSIZED = "unsized"  # key of an image whose size the format does not record


class Source(NamedTuple):
    """An annotation file in the form of a COCO file, not yet reviewed."""

    file: str  # name in messages
    image_root: str  # the folder to which image names are relative
    content: dict


class Builder:
    """Collects images and objects; broken ones are kept for the review to report.

    Args:
        classes: names in order; None: the names of all objects, sorted.
    """

    def __init__(self, classes: Iterable[str] | None = None):
        self._classes = None if classes is None else list(classes)
        self._images, self._objects, self._met = [], [], set()

    def add_image(self, file_name: str, width: object = None, height: object = None) -> int:
        """Adds an image and returns its id; a missing size is read from the file later."""
        entry = {"id": len(self._images) + 1, "file_name": file_name}
        if width is None:
            entry[UNSIZED] = True
        else:
            entry |= {"width": usable_side(width), "height": usable_side(height)}
        self._images.append(entry)
        return entry["id"]

    def add_classes(self, names: Iterable[str]) -> None:
        """Adds classes that may have no objects."""
        self._met.update(names)

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
            image: id of its image.
            label: class name.
            box: [x, y, width, height].
            place: position for messages.
            crowd: a region to ignore.
            polygon: x and y of its points, alternating.
        """
        entry = {"image_id": image, "label": label, "bbox": box, "iscrowd": crowd, "place": place}
        if polygon is not None:
            entry["segmentation"] = [list(polygon)]
        self._objects.append(entry)

    def add_broken_object(self, image: int, problem: str, place: str) -> None:
        """Adds an unusable object."""
        self._objects.append({"image_id": image, "broken": problem, "place": place})

    def add_shape(
        self, image: int, label: object, shape: object, of: Callable[[object], Boxes], place: str
    ) -> None:
        """Adds an object with the box, or box and polygon, that ``of`` computes from ``shape``."""
        try:
            found = of(shape)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            self.add_broken_object(image, f"{format_value(shape)} is not a shape with a box", place)
            return
        box, polygon = found if isinstance(found, tuple) else (found, None)
        self.add_object(image, label, box, place, polygon=polygon)

    def content(self) -> dict:
        """The content of a COCO file with everything added."""
        labels = {o["label"] for o in self._objects if isinstance(o.get("label"), str)}
        labels = {label.strip() for label in labels | self._met} - {""}
        names = sorted(labels) if self._classes is None else self._classes
        ids = {name: number for number, name in enumerate(names, 1)}
        for number, entry in enumerate(self._objects, 1):
            label = entry.pop("label", None)
            entry["id"] = number
            if isinstance(label, str) and label.strip():
                entry["category_id"] = ids.get(label.strip(), label)
            elif "broken" not in entry:
                entry["broken"] = "it has no class name; add one"
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        return {"images": self._images, "categories": categories, "annotations": self._objects}


def enclosing_box(points: Iterable[Sequence[float]]) -> list[float]:
    """[x, y, width, height] around points."""
    xs, ys = zip(*((float(x), float(y)) for x, y in points), strict=True)
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def flat(points: Iterable[Sequence[float]]) -> list[float]:
    """X and y of points, alternating."""
    return [value for point in points for value in point]


def rotated_box(
    box: Sequence[float], degrees: float, pivot: tuple[float, float] = (0.5, 0.5)
) -> list[float]:
    """[x, y, width, height] around a box that is rotated clockwise.

    Args:
        box: [x, y, width, height] before rotation.
        degrees: angle.
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
