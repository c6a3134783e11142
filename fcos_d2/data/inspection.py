"""Checks a whole dataset before training, counts its contents, and repairs annotation files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ..errors import InputError
from .catalog import is_coco, missing_images, prepare, review_dataset, sources_of
from .classes import class_names
from .defects import DEFECTS, DefectError, Problem
from .formats.builder import Source
from .image_files import NO_FILE
from .records import coco_records, is_flat, read_record, review_records, set_classes, xyxy_boxes
from .review import Review, review_coco

READERS = 8  # threads that read images; decoding releases the GIL


class Inspection(NamedTuple):
    """The result of checking a dataset."""

    name: str
    class_names: list[str]
    records: list[dict]  # one per usable image, in detectron2's format
    problems: list[Problem]  # defects that stop training
    repaired: Counter  # key of DEFECTS -> number of repairs
    image_problems: dict[str, str]  # file name -> what is wrong with the image
    unusable: frozenset[str]  # file names of all images without a record
    files: list[str]  # annotation files; empty for records registered in Python

    @property
    def num_problems(self) -> int:
        """Returns the number of defects that stop training."""
        return len(self.problems) + len(self.image_problems)


class Contents(NamedTuple):
    """Counts of usable annotations."""

    boxes_per_class: list[int]
    images_per_class: list[int]
    num_boxes: int
    notes: dict[str, int]  # description of a possible mistake -> count, if above 0


def inspect_dataset(name: str, read_images: bool = True, masks: bool = False) -> Inspection:
    """Checks all annotations and images of a dataset; shows a progress bar on a terminal.

    Args:
        name: registered dataset.
        read_images: decode the images. Otherwise, only images of unknown size are decoded, and the
            others must exist.
        masks: also check ``segmentation``.

    Raises:
        InputError: the name is unknown, the annotation file cannot be read, or the dataset is an
            iterable-style torch dataset.
    """
    prepare(name)
    files, missing, unusable = [], {}, {}
    if is_coco(name):
        sources, review = review_dataset(name, masks)
        files, missing = [source.file for source in sources], review.missing
        repaired, problems = review.repaired, review.problems
        indices = set_classes(name, review.content["categories"])
        records = coco_records(review.content, indices)
        if missing and len(missing) == len(records):
            problems = [*problems, Problem("image", missing_images(name, sources, review))]
            unusable, missing, records = missing, {}, []
    else:
        repaired = Counter()
        records, problems = _review_registered(name)
    records, found = [r for r in records if r["file_name"] not in missing], dict(missing)
    with ThreadPoolExecutor(READERS) as pool:
        reasons = pool.map(_check_image if read_images else _check_path, records)
        bar = tqdm(reasons, name, len(records), leave=False, disable=None)
        for record, reason in zip(records, bar, strict=True):
            if isinstance(reason, str):
                found[record["file_name"]] = reason
            else:
                repaired["size"] += bool(reason)
    records = [record for record in records if record["file_name"] not in found]
    names = list(class_names(name) or ())
    unusable = frozenset((*unusable, *found))
    return Inspection(name, names, records, problems, +repaired, found, unusable, files)


def _review_registered(name: str) -> tuple[list[dict], list[Problem]]:
    """Reviews copies of the records of a dataset registered in Python."""
    records = DatasetCatalog.get(name)
    if isinstance(records, IterableDataset):
        raise InputError(
            f"dataset {name!r} is an iterable-style dataset ({type(records).__name__}), which may "
            "be infinite and cannot be checked; register a list of dicts"
        )
    records = [{"annotations": [], **record} for record in records]
    classes = MetadataCatalog.get(name).get("thing_classes") or ()
    return review_records(records, len(classes) or None)


def _check_path(record: dict) -> str | bool:
    if not {"width", "height"} <= record.keys():
        return _check_image(record)
    return False if os.path.isfile(record["file_name"]) else NO_FILE


def _check_image(record: dict) -> str | bool:
    """Returns what is wrong with an image, or else whether its size in the record was corrected."""
    try:
        return read_record(record, "RGB")[1]
    except (InputError, DefectError) as error:
        return str(error)


def describe_contents(inspection: Inspection) -> Contents:
    """Counts the usable annotations."""
    boxes_per_class, images_per_class, notes = Counter(), Counter(), Counter()
    for record in inspection.records:
        objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        classes = [a["category_id"] for a in objects]
        boxes_per_class.update(classes)
        images_per_class.update(set(classes))
        boxes = xyxy_boxes(objects)
        size = np.array([record["width"], record["height"]] * 2)
        distinct = set(zip(classes, map(tuple, boxes.tolist()), strict=True))
        crowds, over = len(record["annotations"]) - len(objects), (boxes < -1) | (boxes > size + 1)
        notes.update({
            "images without objects": not objects,
            "crowd regions (see MODEL.FCOS.IGNORE_CROWD)": crowds,
            "boxes of zero width or height, which training ignores": sum(map(is_flat, objects)),
            "boxes that exceed their image": int(over.any(axis=1).sum()),
            "duplicate boxes": len(objects) - len(distinct),
        })  # fmt: skip
    classes = range(len(inspection.class_names))
    boxes, images = ([counts[c] for c in classes] for counts in (boxes_per_class, images_per_class))
    return Contents(boxes, images, boxes_per_class.total(), dict(+notes))


class Cleaned(NamedTuple):
    """The repaired content of an annotation file, without unusable entries."""

    file: str
    content: dict
    num_before: int  # annotations in the original file, without duplicates
    repaired: Counter  # key of DEFECTS -> number of repairs
    removed: list[str]  # one line for each kind of defect


def clean(
    inspections: Sequence[Inspection], broken: Sequence[Inspection], masks: bool = False
) -> Iterator[Cleaned]:
    """Repairs the content of annotation files, once per file.

    Args:
        inspections: inspections of all datasets; several may use parts of the same file.
        broken: inspections of the datasets whose files to repair.
        masks: also drop annotations with an invalid ``segmentation``.
    """
    unusable = frozenset().union(*(inspection.unusable for inspection in inspections))
    sizes = {r["file_name"]: r for inspection in inspections for r in inspection.records}
    files: dict[str, list[tuple[Source, bool]]] = {}
    for inspection in broken:
        entry = MetadataCatalog.get(inspection.name).get("entry", {})
        for source in sources_of(inspection.name) if inspection.files else ():
            files.setdefault(source.file, []).append((source, entry.get("upright", True)))
    for file, uses in files.items():
        source, upright = uses[0]
        review = review_coco(source.content, source.image_root, masks, upright)
        roots = {source.image_root for source, _ in uses}
        yield _clean_file(file, review, roots, unusable, sizes)


def _clean_file(
    file: str, review: Review, roots: set[str], unusable: frozenset[str], sizes: dict[str, dict]
) -> Cleaned:
    repaired, images = Counter(review.repaired), []
    for image in review.content["images"]:
        paths = [os.path.join(root, image["file_name"]) for root in roots]
        if not unusable.isdisjoint(paths):
            continue
        record = next((sizes[path] for path in paths if path in sizes), image)
        repaired["size"] += (record["width"], record["height"]) != (image["width"], image["height"])
        size = {key: record[key] for key in ("width", "height")}
        images.append({key: value for key, value in image.items() if key != "path"} | size)
    kept = {image["id"] for image in images}
    annotations = review.content.get("annotations", ())
    annotations = [a for a in annotations if a["image_id"] in kept]
    for annotation in annotations:
        annotation.pop("place", None)
    dropped = Counter(problem.kind for problem in review.problems)
    if dropped.pop("corners", 0):
        repaired["corners"] += len(annotations)
    dropped["image"] += len(review.content["images"]) - len(images)
    removed = [f"{count} {DEFECTS[kind].what}" for kind, count in (+dropped).items()]
    content = {**review.content, "images": images, "annotations": annotations}
    return Cleaned(file, content, review.num_annotations, +repaired, removed)
