"""Exports the whole detector, from uint8 images to boxes, to the formats of other runtimes."""

from .verification import Agreement, compare, join, load_exported, read_metadata, run_detector
from .writers import FORMATS, export_detector

__all__ = [
    "FORMATS",
    "Agreement",
    "compare",
    "export_detector",
    "join",
    "load_exported",
    "read_metadata",
    "run_detector",
]
