"""Reads image files.

Unlike detectron2's reader, this one does not apply the orientation of TIFFs twice, and it rejects
16-bit and float images, which detectron2 turns white or black by clipping values at 255.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, one_line_cause

NOT_IMAGES = frozenset({".pdf", ".mpg", ".mpeg"})  # registered with Pillow
# Prefix of Pillow's mode -> type of the pixels.
UNSUPPORTED = {"I;16": "16-bit integers", "I": "integers of more than 8 bits", "F": "floats"}


def is_image(path: str | os.PathLike) -> bool:
    """Returns whether a path has the suffix of an image file."""
    suffix = Path(path).suffix.lower()
    return suffix in Image.registered_extensions() and suffix not in NOT_IMAGES


def can_hold_rgb(path: str | os.PathLike) -> bool:
    """Returns whether Pillow can write an RGB image to a file with this suffix."""
    try:  # some formats do not support color or need a plugin
        kind = Image.registered_extensions()[Path(path).suffix.lower()]
        Image.new("RGB", (16, 16)).save(BytesIO(), kind)
    except (OSError, ValueError, KeyError):
        return False
    return True


def read_image(file_name: str, image_format: str, upright: bool = True) -> np.ndarray:
    """Reads an image of 8 bits per channel.

    Args:
        file_name: path of the file.
        image_format: "RGB", "BGR", or another format of detectron2.
        upright: apply the EXIF orientation. Pass False if the boxes were drawn on the pixels as
            stored. Pillow always applies it to TIFFs.

    Returns:
        uint8 [H, W, C].

    Raises:
        InputError: the file is missing or invalid, or has more than 8 bits per channel. The message
            does not name the file.
    """
    with _raise_input_error(), PathManager.open(file_name, "rb") as file:
        image = Image.open(file)
        _check_depth(image)
        image.load()  # applies the orientation of TIFFs
        if upright:
            with contextlib.suppress(Exception):  # ignore invalid tags
                ImageOps.exif_transpose(image, in_place=True)
        return utils.convert_PIL_to_numpy(image, image_format)


def image_sizes(file_name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns width and height of an image, upright and as stored; reads only the header.

    Raises:
        InputError: see ``read_image``.
    """
    with _raise_input_error(), PathManager.open(file_name, "rb") as file:
        image = Image.open(file)
        _check_depth(image)
        size = image.size
        # getexif() decodes a PNG to search for a tag after its pixels.
        has_tag = image.format != "PNG" or "exif" in image.info
        is_rotated = has_tag and image.format != "TIFF" and _orientation(image) >= 5
    return size[::-1] if is_rotated else size, size


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # ignore invalid tags
        return 1


def _check_depth(image: Image.Image) -> None:
    for prefix, pixels in UNSUPPORTED.items():
        if image.mode.startswith(prefix):
            raise InputError(
                f"its pixels are {pixels} (Pillow's mode {image.mode}); convert it to 8 bits per "
                "channel"
            )


@contextlib.contextmanager
def _raise_input_error() -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:  # its message contains the repr of a file object
        raise InputError("it is not an image of a known format") from error
    except Exception as error:  # Pillow raises many types for invalid files
        raise InputError(getattr(error, "strerror", None) or one_line_cause(error)) from error


def distinct_names(names: Iterable[Path]) -> list[Path]:
    """Makes the paths of output files unique by numbering repeated ones."""
    names = list(names)
    taken, seen, distinct = set(names), set(), []
    for name in names:
        numbered = (name.with_name(f"{name.stem}_{n}{name.suffix}") for n in count(2))
        unique = next(path for path in numbered if path not in taken) if name in seen else name
        seen.add(name)
        taken.add(unique)
        distinct.append(unique)
    return distinct
