"""The built-in datasets ``digits_train`` and ``digits_val``: how they look, where they lie."""

from .files import (
    NUM_IMAGES,
    SEED,
    SPLITS,
    VERSION,
    Recipe,
    annotation_file,
    default_root,
    ensure_digits,
    image_folder,
)
from .scenes import CLASSES

__all__ = [
    "CLASSES",
    "NUM_IMAGES",
    "SEED",
    "SPLITS",
    "VERSION",
    "Recipe",
    "annotation_file",
    "default_root",
    "ensure_digits",
    "image_folder",
]
