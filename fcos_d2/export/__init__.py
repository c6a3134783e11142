"""Exports detectors to other runtimes as a single graph, from uint8 images to detections."""

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
