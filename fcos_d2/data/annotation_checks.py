"""What is wrong with annotations: a fast yes or no for loaded dicts, and words for the rest."""

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from numbers import Real

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import InputError, format_value

HUGE = 2.0**62  # no pixel lies there, and a tensor holds no integer of 2^63


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
        if not all(_is_flag(a.get("iscrowd", 0)) for a in annotations):
            return None
    except (KeyError, TypeError, ValueError):
        return None
    if boxes.dtype.kind not in "fiu":  # text, None
        return None
    boxes = boxes.reshape(-1, 4)
    if (classes < 0).any() or (num_classes and (classes >= num_classes).any()):
        return None
    is_xyxy = (modes == BoxMode.XYXY_ABS)[:, None]
    sizes = boxes[:, 2:] - np.where(is_xyxy, boxes[:, :2], 0)
    if not (np.abs(boxes) < HUGE).all() or (sizes < 0).any():
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
                cause = (
                    _problem_in_box(box, mode == BoxMode.XYXY_ABS)
                    or _problem_in_crowd(annotation.get("iscrowd", 0))
                    or f"bbox_mode {mode!r} and category_id {annotation.get('category_id')!r} must "
                    f"be BoxMode.XYXY_ABS or XYWH_ABS and 0 to {num_classes or 'K'}-1"
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
        return f"bbox {format_value(box)} is not {names} in numbers"
    if not all(abs(number) < HUGE for number in numbers):
        return f"bbox {format_value(box)} is not finite; remove the annotation"
    start = numbers[:2] if is_xyxy else (0, 0)
    if numbers[2] < start[0] or numbers[3] < start[1]:
        return f"bbox {format_value(box)} has negative size; it must be {names}"
    return None


def _problem_in_crowd(value: object) -> str | None:
    got = format_value(value, quote=True)
    return None if _is_flag(value) else f"iscrowd {got} must be 0 or 1; correct it"


def _is_flag(value: object) -> bool:
    return isinstance(value, (int, float, np.bool_, np.number)) and value in (0, 1)


def read_coco(json_file: str | os.PathLike) -> dict:
    """The content of an annotation file; its annotations themselves are not looked at.

    An image that is listed twice, as in files that were merged, is in it once.

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
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(
            f"cannot read annotation file {json_file}: {format_value(str(error))}; check its path "
            "and rights, or export it again"
        ) from error
    problem = _problem_in_structure(content)
    if problem:
        raise InputError(f"{json_file}: {problem}")
    images = {image["id"]: image for image in content["images"]}
    return {**content, "images": list(images.values())}


def _problem_in_structure(content) -> str | None:
    if not isinstance(content, dict):
        return f"a COCO file is an object, this is a {type(content).__name__}; export it as COCO"
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            return f"it has no {key!r}; a COCO file lists images, annotations and categories"
    if not isinstance(content.get("annotations", []), list):
        return "its 'annotations' are no list; export it as COCO"
    return next(
        (
            problem
            for key, fields in COCO_FIELDS.items()
            for problem in _problems_in_entries(key, content[key], fields)
        ),
        None,
    )


def _problems_in_entries(key: str, entries: list, fields: dict[str, Callable]) -> Iterator[str]:
    """What is wrong with the images or the categories of a COCO file."""
    seen: dict = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            yield f"entry {index} of {key!r} is no object; export it as COCO"
            continue
        for field, is_valid in fields.items():
            if field not in entry:
                number = format_value(entry.get("id", index))
                yield f"entry {number} of {key!r} has no {field!r}; add it"
            elif not is_valid(entry[field]):
                number = format_value(entry.get("id", index))
                value = format_value(entry[field], quote=True)
                yield f"entry {number} of {key!r} has the {field} {value}; correct it"
        number = entry.get("id")
        other = seen.setdefault(_comparable(number), entry)
        # The same image twice is one for pycocotools, the same class twice is two.
        if other is not entry and (key != "images" or other != entry):
            yield f"entry {format_value(number)} of {key!r} has the id of another; number them anew"
    if len({isinstance(number, str) for number in seen}) > 1:
        yield f"of {key!r} some have numbers for ids and others have texts; number them anew"


def _is_id(value: object) -> bool:
    return isinstance(value, (int, float, str)) and value == value


def _comparable(number: object) -> object:
    """``number``, if it is one or a text, and otherwise something that stands for it."""
    return number if _is_id(number) else repr(number)


def _is_side(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < 2**31


def _is_count(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 2**31


def _is_coordinate(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < HUGE


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_list_of(is_valid: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, list) and all(map(is_valid, value))


# What an entry of a COCO file must have, and what that may be.
COCO_FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {
    "images": {"id": _is_id, "file_name": _is_text, "width": _is_side, "height": _is_side},
    "categories": {"id": _is_id, "name": _is_text},
}


def problems_in_coco_annotations(content: dict, masks: bool = False) -> dict[int, str]:
    """Every annotation that cannot be used, by its index in ``content["annotations"]``.

    Args:
        content: of a COCO file, from ``read_coco``.
        masks: look at ``segmentation`` too, which boxes do without.
    """
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    problems, seen = {}, set()
    for index, annotation in enumerate(content.get("annotations", ())):
        if not isinstance(annotation, dict):
            problems[index] = f"annotation {index}: it is no object; export it as COCO"
            continue
        number = annotation.get("id")
        cause = _problem_in_coco_annotation(annotation, images, categories, seen)
        seen.add(_comparable(number))
        cause = cause or (_problem_in_mask(annotation.get("segmentation")) if masks else None)
        if cause:
            name = index if number is None else format_value(number)
            problems[index] = f"annotation {name}: {cause}"
    return problems


def _problem_in_coco_annotation(
    annotation: dict, images: set, categories: set, seen: set
) -> str | None:
    def is_in(key, known):
        value = annotation.get(key)
        return isinstance(value, Hashable) and value in known

    for key in ("id", "image_id", "category_id"):
        if key not in annotation:
            return f"it has no {key!r}; add it"
    if not _is_id(annotation["id"]):
        return "its id is neither a number nor a text; number them anew"
    if _comparable(annotation["id"]) in seen:
        return "its id is that of another annotation; number them anew"
    if not is_in("image_id", images):
        image = format_value(annotation["image_id"])
        return f"image_id {image} is not in the file's images; remove it"
    if not is_in("category_id", categories):
        known = sorted(categories, key=str)
        some = f"{', '.join(map(format_value, known[:5]))}{', ...' if len(known) > 5 else ''}"
        category = format_value(annotation["category_id"])
        return f"category_id {category} is not in the file's categories ({some})"
    if annotation.get("ignore", 0):
        return "detectron2 does not know 'ignore'; use 'iscrowd': 1 for regions to ignore"
    crowd = annotation.get("iscrowd")
    return (
        _problem_in_box(annotation.get("bbox"), is_xyxy=False)
        or _problem_in_crowd(0 if crowd is None else crowd)
        or _problem_in_keypoints(annotation.get("keypoints"))
    )


def _problem_in_keypoints(points: object) -> str | None:
    """detectron2 reads them although boxes are all that FCOS needs."""
    if points and not _is_list_of(_is_coordinate, points):
        return f"keypoints {format_value(points)} are not numbers; remove them"
    return None


def _problem_in_mask(mask: object) -> str | None:
    if not mask or _is_run_length(mask) or _is_list_of(_is_list, mask):
        return None
    return f"segmentation {format_value(mask)} is neither polygons nor run lengths; remove it"


def _is_run_length(mask: object) -> bool:
    if not isinstance(mask, dict):
        return False
    counts, size = mask.get("counts"), mask.get("size")
    if isinstance(counts, str):  # compressed, which detectron2 takes as it is
        return True
    return _is_list_of(_is_count, counts) and _is_list_of(_is_count, size) and len(size) == 2
