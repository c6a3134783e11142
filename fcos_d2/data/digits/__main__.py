"""Generates the built-in datasets in advance, or exports some of their images.

python -m fcos_d2.data.digits [--root DIR] [--images N] [--export FOLDER]
"""

import argparse
import sys
from pathlib import Path

from ...errors import exit_status
from .export import export
from .files import NUM_IMAGES, Recipe, default_root, ensure_digits


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fcos_d2.data.digits", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--root", type=Path, default=default_root(), help="default: %(default)s")
    images = "training images (default: %(default)s); validation gets a fifth as many"
    add("--images", type=int, default=NUM_IMAGES[0], metavar="N", help=images)
    other = "write N training images to FOLDER as a custom dataset with typical mistakes"
    add("--export", type=Path, metavar="FOLDER", help=other)
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error(f"--images must be at least 1, got {options.images}")
    return exit_status(_generate, options)


def _generate(options: argparse.Namespace) -> None:
    if options.export:
        print(f"labels in {export(options.root, options.export, options.images)}")
        return
    num_images = (options.images, max(1, options.images // 5))
    folder = ensure_digits(options.root, Recipe(num_images))
    print(f"{num_images[0]} training and {num_images[1]} validation images in {folder}")


if __name__ == "__main__":
    sys.exit(main())
