"""Finds and repairs the defects of ``defects.py`` in the content of a COCO file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np

from ..errors import InputError, format_value
from .defects import (
    BOX_FORMAT,
    HUGE,
    DefectError,
    Problem,
    is_polygons,
    is_run_lengths,
    is_written_as_corners,
    parse_side,
    repair_box,
    repair_flag,
)
from .formats.builder import UNSIZED
from .image_files import locate_images
from .images import image_sizes

VALID_FLAGS = (None, 0, 1)  # of iscrowd
MAX_SAMPLE = 20_000  # boxes checked for the format [x1, y1, x2, y2]


class Review(NamedTuple):
    """The result of a review."""

    content: dict  # repaired COCO file without invalid entries; images have a ``path``
    repaired: Counter  # key of DEFECTS -> number of repairs
    problems: list[Problem]
    missing: dict[str, str]  # path of each missing image -> reason
    num_annotations: int  # in the file, without duplicates


def review_coco(
    content: dict,
    image_root: str,
    masks: bool = False,
    upright: bool = True,
    part: Callable[[str], bool] | None = None,
) -> Review:
    """Reviews the content of a COCO file.

    Args:
        content: content of the file; may be modified, and shares its entries with the result.
        image_root: folder to which file names are relative.
        masks: also check ``segmentation``.
        upright: apply the EXIF orientation of images.
        part: selects images by file name; None selects all.

    Raises:
        InputError: there are no images, or categories are invalid or ambiguous.
    """
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise InputError(
                f"{key!r} is missing or empty; a COCO file has images, annotations and categories"
            )
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise InputError("'annotations' must be a list; export it as COCO")
    reviewer = _Reviewer(masks, upright)
    categories = _review_categories(content["categories"], reviewer.repaired)
    images = reviewer.review_images(content["images"], image_root, part)
    kept = reviewer.review_annotations(annotations, images, categories)
    result = {**content, "images": images, "categories": categories}
    if "annotations" in content:
        result["annotations"] = kept
    count = reviewer.num_annotations - reviewer.repaired["same annotation"]
    return Review(result, +reviewer.repaired, reviewer.problems, reviewer.missing, count)


def _review_categories(entries: list, repaired: Counter) -> list[dict]:
    """Merges duplicate categories and strips their names.

    Raises:
        InputError: a category has no id or name, or different categories have the same id.
    """
    kept: dict[object, dict] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, (str, int, float)) or not str(name).strip():
            raise InputError(f"entry {index} of 'categories' has no 'name'; add one")
        if not _is_id(entry.get("id")):
            raise InputError(f"category {format_value(name)} has no valid 'id'; add one")
        if not isinstance(name, str) or name != name.strip():
            repaired["class name"] += 1
            entry = {**entry, "name": str(name).strip()}
        other = kept.setdefault(entry["id"], entry)
        if other["name"] != entry["name"]:
            raise InputError(
                f"categories {format_value(other['name'])} and {format_value(entry['name'])} have "
                f"the same id {format_value(entry['id'], quote=True)}; use unique ids"
            )
        repaired["same category"] += other is not entry
    _check_sortable("categories", kept)
    return list(kept.values())


def _is_id(value: object) -> bool:
    return isinstance(value, (int, float, str)) and value == value


def _check_sortable(key: str, ids: Iterable[object]) -> None:
    if len({isinstance(number, str) for number in ids}) > 1:
        raise InputError(f"some ids of {key!r} are numbers and others strings; use only numbers")


class _ExcludedError(Exception):
    """Raised for annotations of images that are not selected."""


class _Ids:
    """Matches references with ids, even if one is a number and the other a string."""

    def __init__(self, ids: Iterable[object]):
        self._ids = dict.fromkeys(ids)
        self._by_text: dict[str, list] = {}
        for number in self._ids:
            self._by_text.setdefault(_format_id(number), []).append(number)

    def match(self, annotation: dict, key: str, repaired: Counter) -> None:
        """Replaces the reference ``key`` of an annotation with the matching id.

        Raises:
            DefectError: no id or several ids match.
        """
        if key not in annotation:
            raise DefectError("entry", f"{key!r} is missing; add it")
        value = annotation[key]
        if isinstance(value, Hashable) and value in self._ids:
            return
        found = self._by_text.get(_format_id(value), ()) if _is_id(value) else ()
        if len(found) != 1:
            some = ", ".join(format_value(number, quote=True) for number in list(self._ids)[:3])
            some += ", ..." if len(self._ids) > 3 else ""
            value = format_value(value, quote=True)
            raise DefectError(key, f"{key} {value} is not an id in the file ({some})")
        annotation[key] = found[0]
        repaired["reference"] += 1


def _format_id(number: int | float | str) -> str:
    return number.strip() if isinstance(number, str) else format_value(number)


class _Reviewer:
    """Reviews one file, and collects repairs and problems."""

    def __init__(self, masks: bool, upright: bool):
        self._masks, self._upright = masks, upright
        self.repaired, self.problems = Counter(), []
        self.missing: dict[str, str] = {}
        self.num_annotations = 0  # without those of excluded images
        self._broken: set = set()  # ids of unusable images
        self._excluded: set = set()  # ids of images that are not selected

    # ---- Images ----

    def review_images(
        self, entries: list, root: str, part: Callable[[str], bool] | None
    ) -> list[dict]:
        """Returns the selected images that have a unique id, a path and a size."""
        kept: dict[object, dict] = {}
        for index, entry in enumerate(entries):
            try:
                image = self._review_image(entry, index, kept)
            except DefectError as error:
                self.problems.append(Problem(error.kind, str(error)))
                if isinstance(entry, dict) and _is_id(entry.get("id")) and entry["id"] not in kept:
                    self._broken.add(entry["id"])
            else:
                kept.setdefault(image["id"], image)
        _check_sortable("images", kept)
        images = list(kept.values())
        located = locate_images(root, [image["file_name"] for image in images])
        for place, (image, path) in enumerate(zip(images, located.paths, strict=True)):
            name, image["file_name"] = image["file_name"], path or image["file_name"]
            image["path"] = os.path.join(root, image["file_name"])
            if part is not None and not part(image["file_name"]):
                self._excluded.add(image["id"])
                continue
            self.repaired["path"] += image["file_name"] != name
            if path is None:
                self.missing[image["path"]] = located.missing[place]
            if image["width"] is None:
                self._read_size(image)
        dropped = self._broken | self._excluded
        return [image for image in images if image["id"] not in dropped]

    def _review_image(self, entry: object, index: int, kept: dict) -> dict:
        """Returns an image, whose size may be None; for a duplicate, the one in ``kept``."""
        if not isinstance(entry, dict):
            raise DefectError(
                "entry", f"entry {index} of 'images' is not a JSON object; export it as COCO"
            )
        if "broken" in entry:  # set by a reader of another format
            raise DefectError("entry", entry["broken"])
        number, name = entry.get("id"), entry.get("file_name")
        if not _is_id(number):
            raise DefectError("entry", f"entry {index} of 'images' has no valid 'id'; add one")
        if number in kept:
            if any(kept[number].get(k) != entry.get(k) for k in ("file_name", "width", "height")):
                raise DefectError(
                    "entry",
                    f"two different images have the id {format_value(number)}; use unique ids",
                )
            self.repaired["same image"] += 1
            return kept[number]
        if not isinstance(name, str) or not name.strip():
            raise DefectError("entry", f"image {format_value(number)} has no 'file_name'; add it")
        sides = [entry.get(key) for key in ("width", "height")]
        if type(sides[0]) is type(sides[1]) is int and min(sides) > 0 and max(sides) < 2**31:
            return entry
        width, height = map(parse_side, sides)
        if width and height:
            self.repaired["number"] += 1
            return {**entry, "width": width, "height": height}
        return {**entry, "width": None, "height": None}

    def _read_size(self, image: dict) -> None:
        try:
            image["width"], image["height"] = image_sizes(image["path"])[0 if self._upright else 1]
            self.repaired["no size"] += not image.pop(UNSIZED, False)
        except InputError as error:
            self._broken.add(image["id"])
            if image["path"] not in self.missing:
                text = f"image {format_value(image['path'])}: {error}"
                self.problems.append(Problem("image", text))

    # ---- Annotations ----

    def review_annotations(
        self, annotations: list, images: list[dict], categories: list[dict]
    ) -> list[dict]:
        """Returns valid annotations, and repaired copies of others."""
        self._sizes = {image["id"]: (image["width"], image["height"]) for image in images}
        self._images = _Ids([*self._sizes, *self._excluded, *self._broken])
        self._categories = _Ids(category["id"] for category in categories)
        known = {category["id"] for category in categories}
        excluded, masks, kept, seen = self._excluded, self._masks, [], {}
        self.num_annotations = len(annotations)
        for index, annotation in enumerate(annotations):
            try:  # fast path: takes about a microsecond
                if annotation["image_id"] in excluded:
                    self.num_annotations -= 1
                    continue
                x, y, width, height = annotation["bbox"]
                is_valid = (
                    annotation["image_id"] in self._sizes
                    and annotation["category_id"] in known
                    and -HUGE < x < HUGE
                    and -HUGE < y < HUGE
                    and 0 <= width < HUGE
                    and 0 <= height < HUGE
                    and annotation.get("iscrowd") in VALID_FLAGS
                    and not annotation.get("ignore")
                    and not (masks and _is_invalid_mask(annotation.get("segmentation")))
                    and annotation["id"] not in seen
                )
            except (KeyError, TypeError, ValueError, AttributeError):
                is_valid = False
            if not is_valid:
                annotation = self._repair(annotation, index, annotations, seen)
                if annotation is None:
                    continue
            seen[annotation["id"]] = index
            kept.append(annotation)
        if self.repaired["id"]:
            for number, annotation in enumerate(kept, 1):
                annotation["id"] = number
        self._convert_corners(kept)
        return kept

    def _repair(self, entry: object, index: int, all_: list, seen: dict) -> dict | None:
        """Returns a repaired copy, or None for invalid, excluded and duplicate annotations."""
        annotation = entry if isinstance(entry, dict) else {"broken": "it is not a JSON object"}
        number, repaired = annotation.get("id"), Counter()
        if _is_id(number) and number in seen and all_[seen[number]] == annotation:
            self.repaired["same annotation"] += 1
            return None
        try:
            fixed = self._fix(annotation, repaired)
        except _ExcludedError:
            self.num_annotations -= 1
            return None
        except DefectError as error:
            place = annotation.get("place", index if number is None else number)
            self.problems.append(Problem(error.kind, f"annotation {format_value(place)}: {error}"))
            return None
        if not _is_id(number) or number in seen:
            repaired["id"] += 1
            fixed["id"] = ("new", index)
        self.repaired.update(repaired)
        return fixed

    def _fix(self, annotation: dict, repaired: Counter) -> dict:
        if "broken" in annotation:  # set by a reader of another format
            raise DefectError("entry", annotation["broken"])
        fixed = dict(annotation)
        self._images.match(fixed, "image_id", repaired)
        if fixed["image_id"] in self._excluded:
            raise _ExcludedError
        if fixed["image_id"] in self._broken:
            raise DefectError("image_id", "its image cannot be used")
        self._categories.match(fixed, "category_id", repaired)
        mask, size = fixed.get("segmentation"), self._sizes[fixed["image_id"]]
        fixed["bbox"] = repair_box(fixed.get("bbox"), mask, size, repaired)
        fixed["iscrowd"] = repair_flag(fixed.get("iscrowd"), repaired)
        if repair_flag(fixed.pop("ignore", 0), repaired) and not fixed["iscrowd"]:
            fixed["iscrowd"] = 1
            repaired["ignore"] += 1
        if self._masks and _is_invalid_mask(mask):
            mask = format_value(mask)
            raise DefectError("mask", f"segmentation must be polygons or run lengths, got {mask}")
        return fixed

    def _convert_corners(self, annotations: list[dict]) -> None:
        """Converts the boxes if all are written as corners, and reports a problem."""
        sample = annotations[:: max(1, len(annotations) // MAX_SAMPLE)]
        boxes = np.array([a["bbox"] for a in sample], float).reshape(-1, 4)
        sizes = np.array([self._sizes[a["image_id"]] for a in sample], float).reshape(-1, 2)
        if not is_written_as_corners(boxes, sizes):
            return
        example = format_value(annotations[0]["bbox"])
        text = f"the boxes fit the images only as [x1, y1, x2, y2], such as bbox {example}, but "
        text += f"must be {BOX_FORMAT}; fcos-d2 check --clean converts them"
        self.problems.append(Problem("corners", text))
        for annotation in annotations:
            x, y, right, bottom = annotation["bbox"]
            if right >= x and bottom >= y:
                annotation["bbox"] = [x, y, right - x, bottom - y]


def _is_invalid_mask(mask: object) -> bool:
    return bool(mask) and not (is_run_lengths(mask) or is_polygons(mask))
