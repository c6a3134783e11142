"""A whole data set looked through before training: everything broken in it, and what it holds.

Training stops at the first thing that it cannot use; this names all of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from torch.utils.data import IterableDataset

from ..errors import InputError
from .annotation_checks import problems_in_coco_annotations, problems_in_records, read_coco
from .catalog import class_names, prepare
from .images import read_image, why_unreadable

READERS = 8  # threads that read images; decoding lets go of Python's lock


class Inspection(NamedTuple):
    """What is in a data set."""

    name: str
    class_names: list[str]
    records: list[dict]  # one per image, with its usable annotations, as detectron2 has them
    annotation_problems: list[str]
    image_problems: dict[str, str]  # file name -> what is wrong with the file
    image_root: str | None
    source_file: str | None  # the user's COCO file, if there is one

    @property
    def num_problems(self) -> int:
        """What training would stop at."""
        return len(self.annotation_problems) + len(self.image_problems)


class Contents(NamedTuple):
    """What is worth knowing about annotations that can be used."""

    boxes_per_class: list[int]
    images_per_class: list[int]
    num_boxes: int
    num_empty: int  # images without any box that is not a crowd
    num_crowds: int
    num_flat: int  # boxes of zero width or height
    num_outside: int  # boxes that reach more than a pixel over the border of their image
    num_repeated: int  # boxes that are there twice, with the same class


def inspect_dataset(
    name: str,
    read_images: bool = True,
    progress: Callable[[Iterable, int], Iterable] | None = None,
    masks: bool = False,
) -> Inspection:
    """Looks at every annotation and, unless told otherwise, reads every image.

    Args:
        name: registered data set.
        read_images: decode the images too; else their files only have to be there, where the data
            set knows their sizes.
        progress: wraps the iteration over the images; gets it and their number.
        masks: look at ``segmentation`` of a COCO file too, for a model that needs it.

    Raises:
        InputError: the name is unknown, the annotation file cannot be read at all, or the data is
            a stream, which may have no end.
    """
    prepare(name)
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    names = class_names(name)
    if json_file:
        content = read_coco(json_file)
        bad = problems_in_coco_annotations(content, masks)
        records, problems = _records(content, metadata.image_root, bad), list(bad.values())
    else:
        records = _registered(name)
        names = names or metadata.get("thing_classes") or []
        bad = list(problems_in_records(records, len(names) or None))
        problems = [problem for _, _, problem in bad]
        _leave_out(records, {(place, index) for place, index, _ in bad})
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_problem_in_image if read_images else _problem_in_path, records)
        found = progress(found, len(records)) if progress else found
        images = {
            record["file_name"]: problem
            for record, problem in zip(records, found, strict=True)
            if problem
        }
    records = [record for record in records if record["file_name"] not in images]
    source = metadata.get("source_file", None if metadata.get("described") else json_file)
    root = metadata.get("image_root")
    return Inspection(name, list(names or ()), records, problems, images, root, source)


def _registered(name: str) -> list[dict]:
    """Copies of the records of a data set that somebody registered in Python."""
    records = DatasetCatalog.get(name)
    if isinstance(records, IterableDataset):
        raise InputError(
            f"data set {name!r} is a stream ({type(records).__name__}) that may have no end; "
            "register a list of dicts to have it checked"
        )
    return [dict(record) for record in records]


def _records(content: dict, image_root: str, bad: dict[int, str]) -> list[dict]:
    """The usable part of a COCO file in detectron2's form."""
    ids = sorted(category["id"] for category in content["categories"])
    number = {category: index for index, category in enumerate(ids)}
    annotations: dict[object, list[dict]] = {image["id"]: [] for image in content["images"]}
    for index, annotation in enumerate(content.get("annotations", ())):
        if index not in bad:
            annotations[annotation["image_id"]].append(
                {
                    "bbox": annotation["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": number[annotation["category_id"]],
                    "iscrowd": annotation.get("iscrowd") or 0,
                }
            )
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": annotations[image["id"]],
        }
        for image in content["images"]
    ]


def _leave_out(records: list[dict], bad: set[tuple[int, int]]) -> None:
    for place, record in enumerate(records):
        annotations = record.get("annotations", ())
        kept = [a for index, a in enumerate(annotations) if (place, index) not in bad]
        record["annotations"] = kept


def _problem_in_path(record: dict) -> str | None:
    if not {"width", "height"} <= record.keys():  # then the image alone says how large it is
        return _problem_in_image(record)
    return None if os.path.isfile(record["file_name"]) else "it does not exist"


def _problem_in_image(record: dict) -> str | None:
    """Why the image of ``record`` cannot be used, found by reading it as training does.

    A record without the size of its image gets it.
    """
    try:
        image = read_image(record["file_name"], "RGB")
    except Exception as error:
        return why_unreadable(error)
    height, width = image.shape[:2]
    expected = record.setdefault("width", width), record.setdefault("height", height)
    if expected != (width, height):
        return (
            f"it is {width} x {height} pixels, but {expected[0]} x {expected[1]} by the annotations"
        )
    return None


def describe_contents(inspection: Inspection) -> Contents:
    """Counts what can be used."""
    boxes_per_class, images_per_class = Counter(), Counter()
    counts = Counter()
    for record in inspection.records:
        objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        classes = [a["category_id"] for a in objects]
        boxes_per_class.update(classes)
        images_per_class.update(set(classes))
        boxes = boxes_of(objects)
        size = np.array([record["width"], record["height"]] * 2)
        keys = {(c, *box) for c, box in zip(classes, boxes.tolist(), strict=True)}
        counts["boxes"] += len(objects)
        counts["empty"] += not objects
        counts["crowds"] += len(record["annotations"]) - len(objects)
        counts["flat"] += int((boxes[:, 2:] <= boxes[:, :2]).any(axis=1).sum())
        counts["outside"] += int(((boxes < -1) | (boxes > size + 1)).any(axis=1).sum())
        counts["repeated"] += len(objects) - len(keys)
    classes = range(len(inspection.class_names))
    return Contents(
        [boxes_per_class[c] for c in classes],
        [images_per_class[c] for c in classes],
        *(counts[k] for k in ("boxes", "empty", "crowds", "flat", "outside", "repeated")),
    )


def boxes_of(annotations: Sequence[dict]) -> np.ndarray:
    """Boxes [n, 4], xyxy in pixels of the image file."""
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def without_problems(
    source_file: str,
    image_roots: Collection[str],
    unusable: Collection[str],
    masks: bool = False,
) -> dict:
    """The content of a COCO file without the images and annotations that cannot be used.

    Args:
        source_file: the COCO file.
        image_roots: the folders that its file names start from: one, or more where several data
            sets use the file, each with images of its own.
        unusable: images to leave out, as paths.
        masks: leave out what has a broken ``segmentation`` too.
    """
    content, unusable = read_coco(source_file), set(unusable)
    bad = problems_in_coco_annotations(content, masks)
    images = [
        image
        for image in content["images"]
        if unusable.isdisjoint(os.path.join(root, image["file_name"]) for root in image_roots)
    ]
    kept = {image["id"] for image in images}
    annotations = [
        annotation
        for index, annotation in enumerate(content.get("annotations", ()))
        if index not in bad and annotation["image_id"] in kept
    ]
    return {**content, "images": images, "annotations": annotations}
