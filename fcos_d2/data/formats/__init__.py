"""Annotation files of all kinds, read as they are into the form of a COCO file."""

from .builder import Source
from .files import read_json, read_text
from .json_files import kind_of, read_annotations
from .xml_files import read_cvat, read_voc
from .yolo import read_yolo

__all__ = [
    "Source",
    "kind_of",
    "read_annotations",
    "read_cvat",
    "read_json",
    "read_text",
    "read_voc",
    "read_yolo",
]
