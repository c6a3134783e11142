"""Writes the built-in datasets ``digits_train`` and ``digits_val`` in COCO format.

``ROOT/digits/{train,val}/NNNNNN.png`` and ``ROOT/digits/annotations/digits_{train,val}.json``;
ROOT is ``$DETECTRON2_DATASETS`` or ``./datasets``. The files are generated on first use, in
seconds, and are identical for the same seed.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from iopath.common.file_io import file_lock
from PIL import Image

from ...errors import InputError
from .scenes import CLASSES, SIZE, Handwriting, compose_scene, load_handwriting

SPLITS = ("train", "val")
NUM_IMAGES = (4000, 200)  # per split; models overfit to fewer
SEED = 0
VERSION = "1.1"  # increase it with every change to a pixel or box
MAKER = "fcos_d2.data.digits"  # folders without this mark are not overwritten

logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """The parameters that determine the content of the files."""

    num_images: tuple[int, int]  # per split
    seed: int = SEED
    version: str = VERSION


def default_root() -> Path:
    """Returns the folder in which detectron2 searches for datasets."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def image_folder(root: str | os.PathLike, split: str) -> Path:
    """Returns the image folder of ``split`` ("train" or "val")."""
    return Path(root) / "digits" / split


def annotation_file(root: str | os.PathLike, split: str) -> Path:
    """Returns the path of the COCO file of ``split``."""
    return Path(root) / "digits" / "annotations" / f"digits_{split}.json"


def ensure_digits(root: str | os.PathLike, recipe: Recipe | None = None) -> Path:
    """Generates the datasets unless they exist in the current version.

    Safe to call from several processes: one generates the datasets, and the others wait.

    Args:
        root: parent folder of ``digits``.
        recipe: required parameters. None accepts any number of images, and generates the default
            number if there are none.

    Returns:
        The folder ``root/digits``.

    Raises:
        InputError: the folder cannot be written, or contains something else.
    """
    root = Path(root)
    folder = root / "digits"
    if _is_usable(root, recipe):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):  # released if the process dies
            if not _is_usable(root, recipe):
                _generate(root, recipe or Recipe(NUM_IMAGES))
    except OSError as error:
        raise InputError(
            f"digits: cannot write {folder} ({error.strerror or error}); "
            "set DETECTRON2_DATASETS to a writable folder"
        ) from error
    return folder


def _is_usable(root: Path, recipe: Recipe | None) -> bool:
    found = _read_recipe(root)
    if found is None or recipe is not None:
        return found is not None and found == recipe
    is_current = (found.version, found.seed) == (VERSION, SEED)
    if is_current and found.num_images != NUM_IMAGES:
        logger.warning(
            f"{root / 'digits'} was generated with {found.num_images} images instead of "
            f"{NUM_IMAGES}; to generate it again: python -m {MAKER} --root {root}"
        )
    return is_current


def _read_recipe(root: Path) -> Recipe | None:
    """Reads the parameters of the datasets under ``root``; returns None if there are none."""
    try:
        info = json.loads(annotation_file(root, "val").read_text())["info"]
        recipe = Recipe(tuple(info["num_images"]), info["seed"], info["version"])
        return recipe if info["made_by"] == MAKER else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _generate(root: Path, recipe: Recipe) -> None:
    """Writes all files to a temporary folder, then renames it."""
    folder, start = root / "digits", time.perf_counter()
    if folder.exists() and any(folder.iterdir()) and _read_recipe(root) is None:
        raise InputError(
            f"digits: {folder} exists and is not the built-in dataset; move it or set "
            "DETECTRON2_DATASETS to another folder"
        )
    for leftover in root.glob(".digits-*"):  # of killed processes, as others wait for the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".digits-") as temporary:
        for split, num_images in zip(SPLITS, recipe.num_images, strict=True):
            _write_split(Path(temporary), split, num_images, recipe)
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        (Path(temporary) / "digits").rename(folder)
    seconds = time.perf_counter() - start
    logger.info(f"generated {sum(recipe.num_images)} images in {folder} in {seconds:.1f} s")


def _write_split(root: Path, split: str, num_images: int, recipe: Recipe) -> None:
    image_folder(root, split).mkdir(parents=True)
    annotation_file(root, split).parent.mkdir(exist_ok=True)
    handwriting = load_handwriting(split, recipe.seed)
    images, annotations = [], []
    for index in range(num_images):
        name = f"{index + 1:06d}.png"
        size = {"width": SIZE, "height": SIZE}
        images.append({"id": index + 1, "file_name": name, **size, "license": 1})
        for found in _write_image(root, split, index, handwriting, recipe.seed):
            annotations.append({**found, "image_id": index + 1, "id": len(annotations) + 1})
    content = {**_description(split, recipe), "images": images, "annotations": annotations}
    annotation_file(root, split).write_text(json.dumps(content))


def _write_image(
    root: Path, split: str, index: int, handwriting: Handwriting, seed: int
) -> list[dict]:
    """Writes one image, and returns the annotations of its digits, without ids."""
    # One generator per image makes it independent of the number and order of images.
    scene = compose_scene(handwriting, np.random.default_rng([seed, SPLITS.index(split), index]))
    path = image_folder(root, split) / f"{index + 1:06d}.png"
    # Noise does not compress well: level 1 is 3x faster than the default, and files are 10% larger.
    Image.fromarray(scene.image).save(path, compress_level=1)
    annotations = []
    for box, label, source in zip(scene.boxes, scene.labels, scene.sources, strict=True):
        x, y, width, height = *box[:2].tolist(), *(box[2:] - box[:2]).tolist()
        shape = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
        annotations.append(
            {"category_id": int(label) + 1, **shape, "handwritten_digit": int(source)}
        )
    return annotations


def _description(split: str, recipe: Recipe) -> dict:
    """Returns the metadata of an annotation file, without a date so that files are reproducible."""
    info = {
        "description": f"digits_{split}: detection scenes composed of handwritten digits",
        "contributor": "fcos_d2",
        "url": "https://scikit-learn.org/stable/datasets/toy_dataset.html",
        "made_by": MAKER,
        **recipe._asdict(),
    }
    handwriting = {
        "id": 1,
        "name": "Handwriting: UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
        "url": "https://creativecommons.org/licenses/by/4.0/",
    }
    names = enumerate(CLASSES, 1)
    categories = [{"id": n, "name": name, "supercategory": "digit"} for n, name in names]
    return {"info": info, "licenses": [handwriting], "categories": categories}
