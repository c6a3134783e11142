"""What is wrong with annotations: a fast yes or no for loaded dicts, and words for what is wrong.

``count_flat_boxes`` costs about a second per million annotations and runs on every load; the
functions that find words look at one annotation after the other and run only after it, or
detectron2, has said that something is wrong.
"""

import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain
from numbers import Real

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import InputError


def count_flat_boxes(annotations: list[dict], num_classes: int | None) -> int | None:
    """How many boxes have zero width or height; None if any annotation cannot be used at all."""
    try:
        count = len(annotations)
        lengths = np.fromiter((len(a["bbox"]) for a in annotations), np.int64, count)
        modes = np.fromiter((a["bbox_mode"] for a in annotations), np.int64, count)
        classes = np.fromiter((a["category_id"] for a in annotations), np.int64, count)
        if (lengths != 4).any() or not np.isin(modes, (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)).all():
            return None
        boxes = np.array(list(chain.from_iterable(a["bbox"] for a in annotations)))
    except (KeyError, TypeError, ValueError):
        return None
    if boxes.dtype.kind not in "fiu":  # text, None
        return None
    boxes = boxes.reshape(-1, 4)
    if (classes < 0).any() or (num_classes and (classes >= num_classes).any()):
        return None
    is_xyxy = (modes == BoxMode.XYXY_ABS)[:, None]
    sizes = boxes[:, 2:] - np.where(is_xyxy, boxes[:, :2], 0)
    if not np.isfinite(boxes).all() or (sizes < 0).any():
        return None
    return int((sizes == 0).any(1).sum())


def problem_in_records(records: list[dict], num_classes: int | None) -> str | None:
    """The first annotation that cannot be used, for data that does not come from a COCO file."""
    return next(iter(problems_in_records(records, num_classes)), (0, 0, None))[2]


def problems_in_records(
    records: list[dict], num_classes: int | None
) -> Iterator[tuple[int, int, str]]:
    """Every annotation that cannot be used: its record's index, its own, and what is wrong."""
    for place, record in enumerate(records):
        for index, annotation in enumerate(record.get("annotations", ())):
            if count_flat_boxes([annotation], num_classes) is None:
                box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
                cause = _problem_in_box(box, mode == BoxMode.XYXY_ABS) or (
                    f"bbox_mode {mode!r} and category_id {annotation.get('category_id')!r} must be "
                    f"BoxMode.XYXY_ABS or XYWH_ABS and 0 to {num_classes or 'K'}-1"
                )
                yield (
                    place,
                    index,
                    f"annotation {index} of image {record.get('file_name')}: {cause}",
                )


def _problem_in_box(box, is_xyxy: bool) -> str | None:
    names = "[x1, y1, x2, y2]" if is_xyxy else "[x, y, width, height]"
    if box is None:
        return f"it has no bbox; give it {names} or remove it"
    numbers = list(box) if isinstance(box, Iterable) else []
    if len(numbers) != 4 or not all(isinstance(number, Real) for number in numbers):
        return f"bbox {box} is not {names} in numbers"
    if not all(map(math.isfinite, numbers)):
        return f"bbox {box} is not finite; remove the annotation"
    start = numbers[:2] if is_xyxy else (0, 0)
    if numbers[2] < start[0] or numbers[3] < start[1]:
        return f"bbox {box} has negative size; it must be {names}"
    return None


def problem_in_coco_file(json_file: str) -> str | None:
    """The first thing wrong with an annotation file; None if all is well."""
    try:
        content = read_coco(json_file)
    except InputError as error:
        return str(error)
    problems = problems_in_coco_annotations(content)
    if not problems:
        return None
    count = f" ({len(problems)} annotations have problems)" if len(problems) > 1 else ""
    return f"{json_file}: {next(iter(problems.values()))}{count}"


def read_coco(json_file: str | os.PathLike) -> dict:
    """The content of an annotation file; its annotations themselves are not looked at.

    Raises:
        InputError: it cannot be read, is not JSON, or lacks what makes a COCO file.
    """
    json_file = os.fspath(json_file)
    try:
        with PathManager.open(json_file) as f:
            content = json.load(f)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{json_file} is not valid JSON: {error.msg} in line {error.lineno} column "
            f"{error.colno}; copy or export it again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read annotation file {json_file}: {error}; check its path and rights"
        ) from error
    problem = _problem_in_structure(content)
    if problem:
        raise InputError(f"{json_file}: {problem}")
    return content


def _problem_in_structure(content) -> str | None:
    if not isinstance(content, dict):
        return f"a COCO file is an object, this is a {type(content).__name__}; export it as COCO"
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            return f"it has no {key!r}; a COCO file lists images, annotations and categories"
    for key, needed in (
        ("images", ("id", "file_name", "width", "height")),
        ("categories", ("id", "name")),
    ):
        for index, entry in enumerate(content[key]):
            lacking = [field for field in needed if field not in entry]
            if lacking:
                return f"entry {entry.get('id', index)} of {key!r} has no {lacking[0]!r}; add it"
    return None


def problems_in_coco_annotations(content: dict) -> dict[int, str]:
    """Every annotation that cannot be used, by its index in ``content["annotations"]``.

    Args:
        content: of a COCO file, from ``read_coco``.
    """
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    problems, seen = {}, set()
    for index, annotation in enumerate(content.get("annotations", ())):
        number = annotation.get("id")
        cause = _problem_in_coco_annotation(annotation, images, categories, seen)
        seen.add(repr(number))
        if cause:
            problems[index] = f"annotation {index if number is None else number}: {cause}"
    return problems


def _problem_in_coco_annotation(annotation: dict, images: set, categories: set, seen: set):
    def is_in(key, known):
        value = annotation.get(key)
        return isinstance(value, Hashable) and value in known

    for key in ("id", "image_id", "category_id"):
        if key not in annotation:
            return f"it has no {key!r}; add it"
    if repr(annotation["id"]) in seen:
        return "its id is that of another annotation; number them anew"
    if not is_in("image_id", images):
        return f"image_id {annotation['image_id']} is not in the file's images; remove it"
    if not is_in("category_id", categories):
        known = sorted(categories, key=str)
        shown = f"{', '.join(map(str, known[:5]))}{', ...' if len(known) > 5 else ''}"
        return f"category_id {annotation['category_id']} is not in the file's categories ({shown})"
    if annotation.get("ignore", 0):
        return "detectron2 does not know 'ignore'; use 'iscrowd': 1 for regions to ignore"
    return _problem_in_box(annotation.get("bbox"), is_xyxy=False)
