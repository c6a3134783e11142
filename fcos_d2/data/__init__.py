"""Datasets by name, the built-in ones among them, and the way from a dataset to the model."""

from .catalog import (
    check_objects,
    load_dataset,
    prepare,
    register_datasets,
    register_digits,
)
from .classes import (
    check_class_order,
    check_num_classes,
    class_names,
    count_classes,
    find_classes,
)
from .mapper import FCOSDatasetMapper

__all__ = [
    "FCOSDatasetMapper",
    "check_class_order",
    "check_num_classes",
    "check_objects",
    "class_names",
    "count_classes",
    "find_classes",
    "load_dataset",
    "prepare",
    "register_datasets",
    "register_digits",
]

register_digits()
