"""Registers and loads datasets, including the built-in ones, and maps them to model inputs."""

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
