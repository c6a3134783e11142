"""Reads image files, and finds names for copies of them.

detectron2's reader applies the orientation of TIFFs twice and clips values at 255, which turns
16-bit images white and float images black; such images are rejected here.
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

NOT_IMAGES = frozenset({".pdf", ".mpg", ".mpeg"})  # although Pillow has them on its list
# What the pixels are, by the beginning of Pillow's mode.
DEEP = {"I;16": "16-bit integers", "I": "integers of more than 8 bits", "F": "floats"}


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file is an image, by its suffix."""
    suffix = Path(path).suffix.lower()
    return suffix in Image.registered_extensions() and suffix not in NOT_IMAGES


def can_hold_rgb(path: str | os.PathLike) -> bool:
    """Whether a color image can be written to a file of this suffix."""
    try:  # some formats that Pillow writes take no colors, and some need a plug-in
        kind = Image.registered_extensions()[Path(path).suffix.lower()]
        Image.new("RGB", (16, 16)).save(BytesIO(), kind)
    except (OSError, ValueError, KeyError):
        return False
    return True


def read_image(file_name: str, image_format: str, upright: bool = True) -> np.ndarray:
    """Reads an image of 8 bits per channel.

    Args:
        file_name: its path.
        image_format: "RGB", "BGR", or another that detectron2 knows.
        upright: apply the EXIF orientation. False for boxes that were drawn on the pixels as
            stored, which Pillow cannot read from TIFFs.

    Returns:
        uint8 [H, W, C].

    Raises:
        InputError: the file is missing or broken, or the pixels have more than 8 bits; the message
            does not name the file.
    """
    with _one_error(), PathManager.open(file_name, "rb") as file:
        image = Image.open(file)
        _check_depth(image)
        image.load()  # applies the orientation of TIFFs
        if upright:
            with contextlib.suppress(Exception):  # a broken tag does not make the image unusable
                ImageOps.exif_transpose(image, in_place=True)
        return utils.convert_PIL_to_numpy(image, image_format)


def image_sizes(file_name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of an image, upright and as stored; reads only the header.

    Raises:
        InputError: as ``read_image``.
    """
    with _one_error(), PathManager.open(file_name, "rb") as file:
        image = Image.open(file)
        _check_depth(image)
        size = image.size
        # Pillow would decode a PNG to search for a tag after its pixels.
        has_tag = image.format != "PNG" or "exif" in image.info
        is_turned = has_tag and image.format != "TIFF" and _orientation(image) >= 5
    return size[::-1] if is_turned else size, size


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken tag does not make the image unusable
        return 1


def _check_depth(image: Image.Image) -> None:
    for beginning, pixels in DEEP.items():
        if image.mode.startswith(beginning):
            raise InputError(
                f"its pixels are {pixels} (Pillow's mode {image.mode}); convert it to 8 bits per "
                "channel"
            )


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:  # whose message is about Python objects
        raise InputError("it is not an image of a known format") from error
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise InputError(getattr(error, "strerror", None) or one_line_cause(error)) from error


def distinct_names(names: Iterable[Path]) -> list[Path]:
    """Relative paths of files to be written, made unique: all but the first get a number."""
    names = list(names)
    taken, met, distinct = set(names), set(), []
    for name in names:
        numbered = (name.with_name(f"{name.stem}_{n}{name.suffix}") for n in count(2))
        chosen = next(path for path in numbered if path not in taken) if name in met else name
        met.add(name)
        taken.add(chosen)
        distinct.append(chosen)
    return distinct
