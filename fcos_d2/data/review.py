"""Looks for the defects of ``defects.py`` in the content of a COCO file; repairs what it can."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import NamedTuple

import numpy as np

from ..errors import InputError, format_value
from .defects import (
    HUGE,
    Problem,
    Unusable,
    is_polygons,
    is_run_lengths,
    is_written_as_corners,
    usable_box,
    usable_flag,
    usable_side,
)
from .formats.builder import NO_SIZES
from .image_files import locate_images
from .images import image_sizes, why_unreadable

PLAIN = (None, 0, 1)  # values of iscrowd that need no repair
SAMPLE = 20_000  # boxes that tell how all are written


class Review(NamedTuple):
    """What there is to say about annotations."""

    content: dict  # of a COCO file: what can be used, repaired. Images have their ``path``
    repaired: Counter  # by key of DEFECTS
    problems: list[Problem]
    missing: dict[str, str]  # path of an image that cannot be found -> why
    num_annotations: int  # that there were, repetitions aside


def review_coco(
    content: dict,
    image_root: str,
    masks: bool = False,
    upright: bool = True,
    part: Callable[[str], bool] | None = None,
) -> Review:
    """Looks through the content of a COCO file.

    Args:
        content: what the file holds; its entries may be changed and end up in the result.
        image_root: the folder that its file names start from.
        masks: look at ``segmentation`` too, which boxes do without.
        upright: images are turned as their orientation says.
        part: whether an image is wanted, by its file name; all are where None.

    Raises:
        InputError: it has no images, or no categories that could be numbered.
    """
    repaired, problems = Counter(), []
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise InputError(f"it has no {key!r}; a COCO file lists images and categories")
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise InputError("its 'annotations' are no list; export it as COCO")
    categories = _Ids(usable_categories(content["categories"], repaired))
    entries, unusable = _images(content["images"], repaired, problems)
    missing, moved = _locate(entries, image_root)
    wanted = [image for image in entries if part is None or part(image["file_name"])]
    unwanted = {image["id"] for image in entries} - {image["id"] for image in wanted}
    unusable |= _complete_sizes(wanted, missing, upright, repaired, problems)
    if content.pop(NO_SIZES, False):  # then it is no defect that there are none
        del repaired["no size"]
    wanted = [image for image in wanted if image["id"] not in unusable]
    repaired["path"] += len(moved - unwanted)
    images = _Ids(entries, wanted, unusable)
    search = _Annotations(images, categories, unwanted, masks, repaired, problems)
    kept = search.usable(annotations)
    _undo_corners(kept, images, problems)
    images.number_anew("image_id", kept, repaired)
    categories.number_anew("category_id", kept, repaired)
    result = {**content, "images": wanted, "categories": categories.entries}
    if "annotations" in content:
        result["annotations"] = kept
    missing = {path: why for number, (path, why) in missing.items() if number not in unwanted}
    return Review(result, +repaired, problems, missing, search.count - repaired["same annotation"])


# ---- categories and images ----


def usable_categories(entries: list, repaired: Counter) -> list[dict]:
    """Categories that have an id and a name each.

    Raises:
        InputError: one has not, or the id of another.
    """
    kept: dict[object, dict] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, (str, int, float)) or not str(name).strip():
            raise InputError(f"entry {index} of 'categories' has no 'name'; give it one")
        if not _is_id(entry.get("id")):
            raise InputError(f"category {format_value(name)} has no usable 'id'; number them anew")
        if not isinstance(name, str) or name != name.strip():
            repaired["class name"] += 1
            entry = {**entry, "name": str(name).strip()}
        other = kept.setdefault(entry["id"], entry)
        if other["name"] != entry["name"]:
            raise InputError(
                f"categories {format_value(other['name'])} and {format_value(entry['name'])} have "
                f"the same id {format_value(entry['id'], quote=True)}; number them anew"
            )
        repaired["same category"] += other is not entry
    return list(kept.values())


def _images(entries: list, repaired: Counter, problems: list[Problem]) -> tuple[list[dict], set]:
    """Images with an id of their own, a file name, and a size or none at all; ids of the others."""
    kept, unusable = {}, set()
    for index, entry in enumerate(entries):
        try:
            image = _image(entry, index, kept, repaired)
        except Unusable as error:
            problems.append(Problem(error.kind, str(error)))
            if isinstance(entry, dict) and _is_id(entry.get("id")) and entry["id"] not in kept:
                unusable.add(entry["id"])
        else:
            if image is not None:
                kept[image["id"]] = image
    return list(kept.values()), unusable


def _image(entry: object, index: int, kept: dict, repaired: Counter) -> dict | None:
    """An image; None if it is one of ``kept`` once more."""
    if not isinstance(entry, dict):
        raise Unusable("entry", f"entry {index} of 'images' is no object; export it as COCO")
    if "broken" in entry:  # by a reader of another format
        raise Unusable("entry", entry["broken"])
    number = entry.get("id")
    if not _is_id(number):
        raise Unusable("entry", f"entry {index} of 'images' has no usable 'id'; number them anew")
    if number in kept:
        if any(kept[number].get(key) != entry.get(key) for key in ("file_name", "width", "height")):
            raise Unusable(
                "entry",
                f"image {format_value(number)} has the id of another of a different name or size; "
                "number them anew",
            )
        repaired["same image"] += 1
        return None
    name = entry.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise Unusable("entry", f"image {format_value(number)} has no 'file_name'; add it")
    sides = [entry.get(key) for key in ("width", "height")]
    if type(sides[0]) is type(sides[1]) is int and min(sides) > 0 and max(sides) < 2**31:
        return entry
    read = [usable_side(side) for side in sides]
    if None in read:
        read = [None, None]
    else:
        repaired["number"] += 1
    return {**entry, "width": read[0], "height": read[1]}


def _locate(images: list[dict], root: str) -> tuple[dict[object, tuple[str, str]], set]:
    """Gives every image its ``path``; by id which are missing and why, and ids of those moved."""
    located = locate_images(root, [image["file_name"] for image in images])
    missing, moved = {}, set()
    for place, (image, path) in enumerate(zip(images, located.paths, strict=True)):
        if path is not None and path != image["file_name"]:
            moved.add(image["id"])
            image["file_name"] = path
        image["path"] = os.path.join(root, image["file_name"])
        if path is None:
            missing[image["id"]] = image["path"], located.missing[place]
    return missing, moved


def _complete_sizes(
    images: list[dict],
    missing: dict[object, tuple[str, str]],
    upright: bool,
    repaired: Counter,
    problems: list[Problem],
) -> set:
    """Reads the heads of images without a size; ids of those that do not say it either."""
    unusable = set()
    for image in images:
        if image["width"] is not None:
            continue
        try:
            size = image_sizes(image["path"])[0 if upright else 1]
        except Exception as error:
            unusable.add(image["id"])
            if image["id"] not in missing:
                reason = why_unreadable(error)
                problems.append(Problem("image", f"image {format_value(image['path'])}: {reason}"))
        else:
            image["width"], image["height"] = size
            repaired["no size"] += 1
    return unusable


class _Ids:
    """Entries by their ids, also by those that are text for a number, or the reverse."""

    def __init__(
        self, entries: list[dict], wanted: list[dict] | None = None, unusable: Collection = ()
    ):
        self.entries, self._unusable = entries if wanted is None else wanted, unusable
        self.by_id = {entry["id"]: entry for entry in self.entries}
        everything = [entry["id"] for entry in entries]
        self._aliases = Counter(map(_alias, everything))
        self._by_alias = {_alias(number): number for number in everything}

    def match(self, annotation: dict, key: str, kind: str, repaired: Counter) -> None:
        """Makes the reference of ``annotation`` the id of an entry.

        Raises:
            Unusable: there is no such entry, or there are several.
        """
        if key not in annotation:
            raise Unusable("entry", f"it has no {key!r}; add it")
        value = annotation[key]
        if isinstance(value, Hashable) and value in self.by_id:
            return
        if isinstance(value, Hashable) and value in self._unusable:
            raise Unusable(kind, "its image cannot be used")
        alias = _alias(value) if _is_id(value) else None
        if self._aliases.get(alias) != 1:
            some = ", ".join(format_value(n, quote=True) for n in list(self.by_id)[:3])
            some += ", ..." if len(self.by_id) > 3 else ""
            value = format_value(value, quote=True)
            raise Unusable(kind, f"{key} {value} is none of the file's ({some})")
        annotation[key] = self._by_alias[alias]
        repaired["reference"] += 1

    def number_anew(self, key: str, annotations: list[dict], repaired: Counter) -> None:
        """Numbers from 1 where ids of several types could not be sorted."""
        if len({isinstance(number, str) for number in self.by_id}) < 2:
            return
        numbers = {old: new for new, old in enumerate(self.by_id, 1)}
        for entry in self.entries:
            entry["id"] = numbers[entry["id"]]
        for annotation in annotations:
            annotation[key] = numbers[annotation[key]]
        repaired["mixed ids"] += len(numbers)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, float, str)) and value == value


def _alias(number: int | float | str) -> str:
    """The same text for a number and for the text that it is written as."""
    return number.strip() if isinstance(number, str) else format_value(number)


# ---- annotations ----


class _Unwanted(Exception):
    """An annotation belongs to an image that is not wanted."""


class _Annotations:
    """Finds out which annotations can be used, and repairs copies of those that need it."""

    def __init__(
        self,
        images: _Ids,
        categories: _Ids,
        unwanted: set,
        masks: bool,
        repaired: Counter,
        problems: list[Problem],
    ):
        self._images, self._categories, self._masks = images, categories, masks
        self._unwanted, self._repaired, self._problems = unwanted, repaired, problems
        self.count = 0  # of those that belong to wanted images, or to none

    def usable(self, annotations: list) -> list[dict]:
        """Those that can be used. A microsecond for one without a defect."""
        images, categories = self._images.by_id, self._categories.by_id
        unwanted, masks, kept, seen = self._unwanted, self._masks, [], {}
        self.count = len(annotations)
        for index, annotation in enumerate(annotations):
            try:
                if annotation["image_id"] in unwanted:
                    self.count -= 1
                    continue
                x, y, width, height = annotation["bbox"]
                is_plain = (
                    annotation["image_id"] in images
                    and annotation["category_id"] in categories
                    and -HUGE < x < HUGE
                    and -HUGE < y < HUGE
                    and 0 <= width < HUGE
                    and 0 <= height < HUGE
                    and annotation.get("iscrowd") in PLAIN
                    and not annotation.get("ignore")
                    and not annotation.get("keypoints")
                    and not (masks and annotation.get("segmentation"))
                    and annotation["id"] not in seen
                )
            except (KeyError, TypeError, ValueError, AttributeError):
                is_plain = False
            if not is_plain:
                annotation = self._repair(annotation, index, annotations, seen)
                if annotation is None:
                    continue
            seen[annotation["id"]] = index
            kept.append(annotation)
        if self._repaired["id"]:
            for number, annotation in enumerate(kept, 1):
                annotation["id"] = number
        return kept

    def _repair(self, annotation: object, index: int, all_: list, seen: dict) -> dict | None:
        """A repaired copy; None if there is none, or there is one already."""
        number = annotation.get("id") if isinstance(annotation, dict) else None
        has_id = _is_id(number) and number not in seen
        if not has_id and _is_id(number) and all_[seen[number]] == annotation:
            self._repaired["same annotation"] += 1
            return None
        repaired = Counter()
        try:
            fixed = self._fixed(annotation, repaired)
        except _Unwanted:
            self.count -= 1
            return None
        except Unusable as error:
            place = index if number is None else format_value(number)
            if isinstance(annotation, dict):
                place = annotation.get("place", place)
            self._problems.append(Problem(error.kind, f"annotation {place}: {error}"))
            return None
        if not has_id:
            repaired["id"] += 1
            fixed["id"] = ("new", index)
        self._repaired.update(repaired)
        return fixed

    def _fixed(self, annotation: object, repaired: Counter) -> dict:
        if not isinstance(annotation, dict):
            raise Unusable("entry", "it is no object; export it as COCO")
        if "broken" in annotation:  # by a reader of another format
            raise Unusable("box", annotation["broken"])
        fixed = dict(annotation)
        self._images.match(fixed, "image_id", "image_id", repaired)
        if fixed["image_id"] in self._unwanted:
            raise _Unwanted
        self._categories.match(fixed, "category_id", "category_id", repaired)
        image, mask = self._images.by_id[fixed["image_id"]], fixed.get("segmentation")
        size = image["width"], image["height"]
        fixed["bbox"] = usable_box(fixed.get("bbox"), mask, False, size, repaired)
        fixed["iscrowd"] = usable_flag(fixed.get("iscrowd"), repaired)
        if usable_flag(fixed.pop("ignore", 0), repaired) and not fixed["iscrowd"]:
            fixed["iscrowd"] = 1
            repaired["ignore"] += 1
        if not _are_coordinates(fixed.get("keypoints") or []):
            del fixed["keypoints"]
            repaired["keypoints"] += 1
        if self._masks and mask and not (is_run_lengths(mask) or is_polygons(mask)):
            mask = format_value(mask)
            raise Unusable("mask", f"segmentation {mask} is neither polygons nor run lengths")
        return fixed


def _are_coordinates(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and abs(value) < HUGE for value in values
    )


def _undo_corners(annotations: list[dict], images: _Ids, problems: list[Problem]) -> None:
    """Makes [x, y, width, height] of boxes that all were written as corners, and says so."""
    sample = annotations[:: max(1, len(annotations) // SAMPLE)]
    boxes = np.array([a["bbox"] for a in sample], float).reshape(-1, 4)
    sizes = [images.by_id[a["image_id"]] for a in sample]
    sizes = np.array([(s["width"], s["height"]) for s in sizes], float).reshape(-1, 2)
    if not is_written_as_corners(boxes, sizes):
        return
    example = format_value(annotations[0]["bbox"])
    problems.append(
        Problem(
            "corners",
            f"its boxes fit their images only as [x1, y1, x2, y2], like bbox {example}, but are to "
            "be [x, y, width, height]; --check --clean writes a file with those",
        )
    )
    for annotation in annotations:
        x, y, right, bottom = annotation["bbox"]
        if right >= x and bottom >= y:
            annotation["bbox"] = [x, y, right - x, bottom - y]
