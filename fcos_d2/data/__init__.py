"""Data sets by name, the built-in ones among them, and the way from a data set to the model."""

from .catalog import (
    check_num_classes,
    class_names,
    coco_content,
    count_classes,
    load_dataset,
    prepare,
    register_datasets,
    register_digits,
)
from .mapper import FCOSDatasetMapper

__all__ = [
    "FCOSDatasetMapper",
    "check_num_classes",
    "class_names",
    "coco_content",
    "count_classes",
    "load_dataset",
    "prepare",
    "register_datasets",
    "register_digits",
]

register_digits()
