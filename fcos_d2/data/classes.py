"""Checks that a model and its datasets agree on the classes, and that there are objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import InputError, format_value
from .catalog import CHECK, is_flat, label, prepare, sources_of
from .custom import class_names_of


def check_num_classes(names: str | Sequence[str], num_classes: int) -> None:
    """Makes sure that every dataset has as many classes as the model.

    Raises:
        InputError: it has another number of classes.
    """
    for name in [names] if isinstance(names, str) else names:
        classes = class_names(name)
        if classes is not None and len(classes) != num_classes:
            some = ", ".join(map(format_value, classes[:3])) + (", ..." if len(classes) > 3 else "")
            raise InputError(
                f"dataset {name!r} has {len(classes)} classes ({some}) but the model has "
                f"{num_classes}; set MODEL.FCOS.NUM_CLASSES {len(classes)}"
            )


def check_class_order(trained: Sequence[str], name: str) -> None:
    """Makes sure that a dataset numbers the classes as those that were trained on do.

    Args:
        trained: datasets of the training, which need not be at hand.
        name: that is to be evaluated.

    Raises:
        InputError: a class of both has different numbers.
    """
    try:
        ours = next(filter(None, map(class_names, trained)), None)
    except InputError:  # it is not at hand
        return
    theirs = class_names(name)
    both = set(ours or ()) & set(theirs or ())
    for class_ in sorted(both):
        number, expected = theirs.index(class_), ours.index(class_)
        if number != expected:
            raise InputError(
                f"dataset {name!r}: class {format_value(class_)} has index {number}, but index "
                f"{expected} in the training data; set classes: {format_value(list(ours))} in "
                f"DATASETS.REGISTER.{name}"
            )


def check_objects(records: Sequence[dict], names: Sequence[str]) -> None:
    """Makes sure that there is something to learn.

    Raises:
        InputError: all annotations are crowd regions, without area or outside the image.
    """
    if isinstance(records, list) and not any(map(_shows_object, records)):
        raise InputError(
            f"{label(names)}: there is nothing to learn: no annotation other than crowd "
            f"regions has a box with area inside its image; see {CHECK}"
        )


def _shows_object(record: Mapping) -> bool:
    size = record.get("width", math.inf), record.get("height", math.inf)
    return any(
        not (annotation.get("iscrowd", 0) or is_flat(annotation))
        and all(start < side for start, side in zip(annotation["bbox"], size, strict=False))
        for annotation in record.get("annotations", ())
    )


def count_classes(name: str) -> int | None:
    """How many classes a dataset has; None if it declares none."""
    names = class_names(name)
    return None if names is None else len(names)


def class_names(name: str) -> list[str] | None:
    """Class names of a dataset in the order of the model's classes; None if it declares none.

    Cheap after ``load_dataset``; before it, the annotation file may have to be read for them.

    Raises:
        InputError: unknown name, or an annotation file that cannot be used.
    """
    if name in DatasetCatalog and (known := MetadataCatalog.get(name).get("thing_classes")):
        return known  # of a dataset that need not be there yet
    prepare(name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("described") or metadata.get("json_file"):
        found = class_names_of(sources_of(name), metadata.get("described", {}))
        metadata.set(thing_classes=found)
        return found
    return None
