"""Data sets by name, and every problem with one of them as a single line that says what to do.

COCO files are checked and turned into records here; whatever else is registered, its own function
loads.
"""

import logging
import os
from collections.abc import Sequence
from itertools import chain

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from torch.utils.data import ConcatDataset

from ..errors import InputError, format_value
from .annotation_checks import count_flat_boxes, problem_in_records, read_coco
from .custom import is_coco, load_coco, prepare, where_data_lives

MOST_FOLDERS = 1000  # that are listed to find missing images; more of them would take too long

logger = logging.getLogger(__name__)


def load_dataset(
    names: str | Sequence[str], filter_empty: bool = True, masks: bool = False
) -> Sequence[dict]:
    """Records of one or more data sets in detectron2's standard format, checked.

    Args:
        names: registered data sets; those of one call must have the same classes.
        filter_empty: leave out images without any annotation that is not a crowd.
        masks: keep ``segmentation``, for a model that needs it. It is most of the memory that COCO
            takes, and an object whose polygons all have under three points is left out.

    Returns:
        one dict per image. Where any has ``annotations`` all have: an image that came without is
        one without objects.

    Raises:
        InputError: unknown name; annotation file absent, broken or not COCO; annotation without
            box, with a box of negative or non-finite size, of an unknown class or image, or with
            an ``iscrowd`` other than 0 and 1; no image with objects; image file missing. Boxes of
            zero size are legal (no point serves them): only a warning.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise InputError("no data set is named; set DATASETS.TRAIN or DATASETS.TEST")
    datasets = [_load_one(name, masks) for name in names]
    if not all(isinstance(dataset, list) for dataset in datasets):  # torch's are not looked through
        return ConcatDataset(datasets) if len(datasets) > 1 else datasets[0]
    records = list(chain.from_iterable(datasets))
    if not records:
        raise InputError(f"{_label(names)}: there are no images")
    if any("annotations" in record for record in records):
        for index, record in enumerate(records):
            if "annotations" not in record:
                records[index] = {**record, "annotations": []}
        _check_annotations(records, names)
        if filter_empty:  # only now, so that what is no number does not pass for a crowd
            records = _with_objects(records, names)
    _check_image_files(records, names)
    if not masks:
        _leave_out_masks(records)
    return records


def _load_one(name: str, masks: bool) -> Sequence[dict]:
    prepare(name)
    try:
        return load_coco(name, masks) if is_coco(name) else DatasetCatalog.get(name)
    except OSError as error:
        cause = " ".join(str(error).split())
        raise InputError(f"{_label([name])}: {cause}; {where_data_lives(name)}") from error


def _with_objects(records: list[dict], names: Sequence[str]) -> list[dict]:
    kept = filter_images_with_only_crowd_annotations(records)
    if not kept:
        raise InputError(
            f"{_label(names)}: no image has an object; DATALOADER.FILTER_EMPTY_ANNOTATIONS False "
            "keeps images without objects"
        )
    return kept


def _leave_out_masks(records: list[dict]) -> None:
    """Replaces the records one after the other, so that they never take more than they did.

    What is in them may be the user's own and stays as it is.
    """
    for index, record in enumerate(records):
        if "annotations" in record:
            annotations = [
                {key: value for key, value in annotation.items() if key != "segmentation"}
                for annotation in record["annotations"]
            ]
            records[index] = {**record, "annotations": annotations}


def check_num_classes(names: str | Sequence[str], num_classes: int) -> None:
    """Makes sure that every data set has as many classes as the model.

    Raises:
        InputError: it has another number of classes.
    """
    for name in [names] if isinstance(names, str) else names:
        classes = class_names(name)
        if classes is not None and len(classes) != num_classes:
            some = ", ".join(map(format_value, classes[:3])) + (", ..." if len(classes) > 3 else "")
            raise InputError(
                f"data set {name!r} has {len(classes)} classes ({some}) but the model has "
                f"{num_classes}; set MODEL.FCOS.NUM_CLASSES {len(classes)}"
            )


def count_classes(name: str) -> int | None:
    """How many classes a data set has; None if it declares none."""
    names = class_names(name)
    return None if names is None else len(names)


def class_names(name: str) -> list[str] | None:
    """Class names of a data set in the order of the model's classes; None if it declares none.

    Cheap after ``load_dataset``; before it, the annotation file may have to be read for them.

    Raises:
        InputError: unknown name, or an annotation file that cannot be used.
    """
    if name in DatasetCatalog and (known := MetadataCatalog.get(name).get("thing_classes")):
        return known  # of a data set that need not be there yet
    prepare(name)
    json_file = MetadataCatalog.get(name).get("json_file")
    if not json_file:
        return None
    categories = read_coco(json_file)["categories"]
    return [category["name"] for category in sorted(categories, key=lambda c: c["id"])]


def _label(names: Sequence[str]) -> str:
    return f"data set{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"


def _check_annotations(records: list[dict], names: Sequence[str]) -> None:
    classes = {tuple(MetadataCatalog.get(name).get("thing_classes") or ()) for name in names}
    if len(classes) > 1:
        raise InputError(
            f"{_label(names)} have different classes; use data sets of the same classes together"
        )
    (classes,) = classes
    annotations = list(chain.from_iterable(r.get("annotations", ()) for r in records))
    num_flat = count_flat_boxes(annotations, len(classes) or None)
    if num_flat is None:
        raise InputError(f"{_label(names)}: {problem_in_records(records, len(classes) or None)}")
    if num_flat:
        logger.warning(
            f"{_label(names)}: {num_flat} boxes have zero width or height; "
            "no point serves them, so they are not learned"
        )
    if classes:
        print_instances_class_histogram(records, classes)


def _check_image_files(records: list[dict], names: Sequence[str]) -> None:
    """Lists folders instead of asking for every file: a fraction of a second for 118,000 images."""
    folders: dict[str, list[str]] = {}
    for record in records:
        folder, file_name = os.path.split(record.get("file_name", ""))
        if file_name and "://" not in folder:
            folders.setdefault(folder, []).append(file_name)
    if len(folders) > MOST_FOLDERS:
        return
    missing = []
    for folder, file_names in folders.items():
        present = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ()
        missing += [os.path.join(folder, name) for name in file_names if name not in present]
    if missing:
        raise InputError(
            f"{_label(names)}: image {format_value(missing[0])} does not exist (missing: "
            f"{len(missing)} of {len(records)}); {where_data_lives(names[0])}"
        )
