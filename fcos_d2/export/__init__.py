"""The whole detector, from uint8 images to boxes, in the formats of other runtimes."""

from .graph import (
    Agreement,
    compare,
    export_detector,
    join,
    load_exported,
    read_metadata,
    run_detector,
)

__all__ = [
    "Agreement",
    "compare",
    "export_detector",
    "join",
    "load_exported",
    "read_metadata",
    "run_detector",
]
