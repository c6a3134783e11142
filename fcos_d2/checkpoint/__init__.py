"""Checkpoints of every FCOS: read without running what is in a file, recognized, converted."""

from .checkpointer import Checkpointer

__all__ = ["Checkpointer"]
