"""From the content of a COCO file to records in detectron2's standard format."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import InputError, format_value


def set_classes(name: str, categories: Iterable[dict]) -> dict[object, int]:
    """Puts the classes of a COCO file into the metadata of data set ``name``, ordered by id.

    Returns:
        class index by category id.

    Raises:
        InputError: the metadata declares other classes.
    """
    categories = sorted(categories, key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    indices = {category["id"]: index for index, category in enumerate(categories)}
    metadata = MetadataCatalog.get(name)
    declared = metadata.get("thing_classes", names)
    if list(declared) != names:
        found, expected = (format_value(", ".join(classes)) for classes in (names, declared))
        raise InputError(
            f"data set {name!r}: its annotation file has the classes {found}, but its metadata "
            f"declares {expected}; call MetadataCatalog.remove({name!r}) before you register it "
            "again"
        )
    metadata.set(thing_classes=declared)
    metadata.set(thing_dataset_id_to_contiguous_id=indices)
    return indices


def coco_records(
    content: dict, image_root: str, indices: dict[object, int], masks: bool = False
) -> list[dict]:
    """One record per image, ordered by image id, as ``load_coco_json`` makes them.

    Args:
        content: of a COCO file without defects; its lists may end up in the records.
        image_root: the folder that its file names start from.
        indices: class index by category id.
        masks: keep ``segmentation`` in detectron2's form, and leave out objects without one polygon
            of three points. Without it, no object is lost for its mask.
    """
    annotations: dict[object, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", ()):
        record = {
            "iscrowd": annotation.get("iscrowd") or 0,
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": indices[annotation["category_id"]],
        }
        if annotation.get("keypoints"):
            record["keypoints"] = _pixel_centers(annotation["keypoints"])
        if masks and annotation.get("segmentation"):
            record["segmentation"] = _mask(annotation["segmentation"])
            if not record["segmentation"]:
                continue
        annotations[annotation["image_id"]].append(record)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def _mask(segmentation: dict | list) -> dict | list:
    """Polygons of at least three points, or compressed run lengths."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return mask_util.frPyObjects(segmentation, *segmentation["size"])
        return segmentation
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]


def _pixel_centers(keypoints: list) -> list:
    """COCO counts keypoints in whole pixels, detectron2 from the corner of the image."""
    return [value + 0.5 if i % 3 != 2 else value for i, value in enumerate(keypoints)]
