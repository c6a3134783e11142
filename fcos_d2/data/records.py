"""Creates and checks records in detectron2's standard format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import InputError, format_value
from .defects import HUGE, Problem, check_size
from .images import image_sizes, read_image


def set_classes(name: str, categories: Iterable[dict]) -> dict[object, int]:
    """Sets the classes of a COCO file, ordered by id, in the metadata of a dataset.

    Returns:
        Category id -> class index.

    Raises:
        InputError: the metadata already has different classes.
    """
    categories = sorted(categories, key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    indices = {category["id"]: index for index, category in enumerate(categories)}
    metadata = MetadataCatalog.get(name)
    declared = metadata.get("thing_classes", names)
    if list(declared) != names:
        found, expected = (format_value(", ".join(classes)) for classes in (names, declared))
        raise InputError(
            f"dataset {name!r}: the annotation file has the classes {found}, but its metadata "
            f"has {expected}; call MetadataCatalog.remove({name!r}) before registering it again"
        )
    metadata.set(thing_classes=declared)
    metadata.set(thing_dataset_id_to_contiguous_id=indices)
    return indices


def coco_records(content: dict, indices: dict[object, int], masks: bool = False) -> list[dict]:
    """Converts a COCO file to records like ``load_coco_json``, ordered by image id; no keypoints.

    Args:
        content: content of a ``Review``; the records share its boxes.
        indices: category id -> class index.
        masks: keep ``segmentation`` and drop objects without a polygon of at least three points.
    """
    annotations: dict[object, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", ()):
        record = {
            "iscrowd": annotation.get("iscrowd") or 0,
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": indices[annotation["category_id"]],
        }
        if masks and annotation.get("segmentation"):
            record["segmentation"] = _convert_mask(annotation["segmentation"])
            if not record["segmentation"]:
                continue
        annotations[annotation["image_id"]].append(record)
    return [
        {
            "file_name": image["path"],
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
            **({} if image.get("upright", True) else {"upright": False}),
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def _convert_mask(segmentation: dict | list) -> dict | list:
    """Compresses run lengths; drops polygons with fewer than three points."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]


# ---- Images and boxes ----


def xyxy_boxes(annotations: Sequence[dict]) -> np.ndarray:
    """Returns the boxes of n annotations, float64 [n, 4], xyxy in pixels of the image file."""
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def read_record(record: dict, image_format: str) -> tuple[np.ndarray, bool]:
    """Reads the image of a record and sets the record's width and height to its size.

    Returns:
        The image, uint8 [H, W, C], and whether the record had a different size.

    Raises:
        DefectError: the boxes may refer to a different size.
        InputError: see ``read_image``.
    """
    file_name = record["file_name"]
    image = read_image(file_name, image_format, record.get("upright", True))
    height, width = image.shape[:2]
    annotated = record.setdefault("width", width), record.setdefault("height", height)
    if annotated == (width, height):
        return image, False
    corners = xyxy_boxes(record.get("annotations", ()))[:, 2:]
    check_size(annotated, (width, height), image_sizes(file_name)[1], corners)
    record["width"], record["height"] = width, height
    return image, True


def evenly_spaced(records: Sequence, count: int) -> list:
    """Returns up to ``count`` records at regular intervals."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


# ---- Objects to train on ----


def is_flat(annotation: Mapping) -> bool:
    """Returns whether the box of an annotation has zero width or height."""
    x, y, right, bottom = annotation["bbox"]
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        return not (right and bottom)
    return right == x or bottom == y


def explain_missing_objects(records: Sequence[dict]) -> str | None:
    """Explains why no record has an object to train on; returns None if one has."""
    if any(_shows_object(a, record) for record in records for a in record.get("annotations", ())):
        return None
    if not records:
        return "all images are unusable"
    flags = [a.get("iscrowd", 0) for record in records for a in record.get("annotations", ())]
    if not flags:
        return "there are no annotations; check that this is the right file and contains them"
    if all(flags):
        return (
            f"all {len(flags)} annotations are crowd regions (iscrowd 1, or 'difficult' in Pascal "
            "VOC), which training ignores; if they are masks of CVAT's brush tool, which it "
            "exports as crowd regions, set iscrowd to 0"
        )
    return (
        f"all {flags.count(0)} boxes are outside their images or have zero area; they must be "
        "[x, y, width, height] in pixels of the images"
    )


def _shows_object(annotation: Mapping, record: Mapping) -> bool:
    if annotation.get("iscrowd", 0) or is_flat(annotation):
        return False
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    width, height = record.get("width", math.inf), record.get("height", math.inf)
    return box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0


# ---- Records of other functions ----


def review_records(
    records: Sequence[dict], num_classes: int | None
) -> tuple[list[dict], list[Problem]]:
    """Checks records of a dataset function that the user registered.

    Returns:
        The records without invalid annotations, and a problem for each of these. Records are copied
        if annotations are dropped.
    """
    problems, kept = [], []
    for record in records:
        annotations = record.get("annotations", ())
        broken = [i for i, a in enumerate(annotations) if not _is_valid(a, num_classes)]
        for index in broken:
            keys = ("bbox", "bbox_mode", "iscrowd", "category_id")
            got = {key: annotations[index].get(key) for key in keys}
            text = (
                f"annotation {index} of image {record.get('file_name')}: bbox must be four finite "
                "numbers with nonnegative width and height, bbox_mode BoxMode.XYXY_ABS or "
                f"XYWH_ABS, iscrowd 0 or 1, and category_id 0 to {num_classes or 'K'}-1, got "
                f"{format_value(got)}"
            )
            problems.append(Problem("entry", text))
        usable = [a for i, a in enumerate(annotations) if i not in broken]
        kept.append({**record, "annotations": usable} if broken else record)
    return kept, problems


def _is_valid(annotation: dict, num_classes: int | None) -> bool:
    try:
        x, y, right, bottom = annotation["bbox"]
        if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
            right, bottom = x + right, y + bottom
        return bool(
            annotation["bbox_mode"] in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            and -HUGE < x <= right < HUGE
            and -HUGE < y <= bottom < HUGE
            and annotation.get("iscrowd", 0) in (0, 1)
            and 0 <= annotation["category_id"] < (num_classes or HUGE)
        )
    except (KeyError, TypeError, ValueError):
        return False
