"""Checkpoints of every FCOS implementation: safe reading, recognition and conversion."""

from .checkpointer import Checkpointer

__all__ = ["Checkpointer"]
