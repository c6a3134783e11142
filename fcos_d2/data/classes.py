"""Checks that a model and its datasets agree on the classes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import InputError, format_value
from .catalog import prepare, sources_of
from .custom import class_names_of


def check_num_classes(names: str | Sequence[str], num_classes: int) -> None:
    """Checks that every dataset has as many classes as the model.

    Raises:
        InputError: a dataset has a different number of classes.
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
    """Checks that a dataset has the classes of the training data, in the same order.

    Args:
        trained: training datasets; the first one with classes is compared, if it is available.
        name: dataset to evaluate.

    Raises:
        InputError: the names of a class differ.
    """
    try:
        ours = next(filter(None, map(class_names, trained)), None)
    except InputError:  # not available
        return
    theirs = class_names(name) or ()
    for index, (trained_on, found) in enumerate(zip(ours or (), theirs, strict=False)):
        if trained_on != found:
            raise InputError(
                f"dataset {name!r}: class {index} is {format_value(found)}, but "
                f"{format_value(trained_on)} in the training data; set classes: "
                f"{format_value(list(ours))} in DATASETS.REGISTER.{name}, and rename classes whose "
                "names differ"
            )


def find_classes(datasets: Sequence[str], num_classes: int) -> tuple[str | None, list[str] | None]:
    """Returns the first available dataset with ``num_classes`` classes, and its class names."""
    for dataset in datasets:
        with contextlib.suppress(InputError):
            names = class_names(dataset)
            if names and len(names) == num_classes:
                return dataset, names
    return None, None


def count_classes(name: str) -> int | None:
    """Returns the number of classes of a dataset, or None if it declares none."""
    names = class_names(name)
    return None if names is None else len(names)


def class_names(name: str) -> list[str] | None:
    """Returns the class names of a dataset in the model's order, or None if it declares none.

    May read the annotation file unless ``load_dataset`` was called before.

    Raises:
        InputError: the name is unknown, or the annotation file cannot be used.
    """
    if name in DatasetCatalog and (known := MetadataCatalog.get(name).get("thing_classes")):
        return known  # the files need not exist
    prepare(name)
    metadata = MetadataCatalog.get(name)
    if not metadata.get("entry") and not metadata.get("json_file"):
        return None
    metadata.set(thing_classes=class_names_of(sources_of(name), metadata.get("entry", {})))
    return metadata.thing_classes
