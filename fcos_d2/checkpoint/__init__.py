"""Checkpoints of every FCOS: read without running what is in a file, recognised, converted."""

from . import downloads  # noqa: F401  (registers how URLs are opened)
from .checkpointer import Checkpointer

__all__ = ["Checkpointer"]
