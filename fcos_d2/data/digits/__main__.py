"""Generates the built-in data: ``python -m fcos_d2.data.digits [--root DIR] [--images N]``.

They are generated on first use; this is for looking at them, or for fewer or more images. With
``--export FOLDER`` it writes some of them as a dataset of somebody else, to practice on.
"""

import argparse
import sys
from pathlib import Path

from ...errors import InputError
from . import (
    NUM_IMAGES,
    SPLITS,
    Recipe,
    annotation_file,
    default_root,
    ensure_digits,
    image_folder,
)
from .export import export


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fcos_d2.data.digits", description=__doc__.splitlines()[2]
    )
    parser.add_argument("--root", type=Path, default=default_root(), help="default: %(default)s")
    parser.add_argument(
        "--images",
        type=int,
        default=NUM_IMAGES[0],
        metavar="N",
        help="training images (default: %(default)s); validation gets a fifth of that",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="write N training images there under other names, with typical mistakes",
    )
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error(f"--images must be at least 1, got {options.images}")
    num_images = (options.images, max(1, options.images // 5))
    try:
        if options.export:
            print(f"labels in {export(options.root, options.export, options.images)}")
            return 0
        ensure_digits(options.root, Recipe(num_images))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, count in zip(SPLITS, num_images, strict=True):
        print(
            f"digits_{split}: {count} images in {image_folder(options.root, split)}, "
            f"boxes in {annotation_file(options.root, split)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
