"""The built-in datasets ``digits_train`` and ``digits_val`` on disk, in COCO format.

``ROOT/digits/{train,val}/NNNNNN.png`` and ``ROOT/digits/annotations/digits_{train,val}.json``;
ROOT is ``$DETECTRON2_DATASETS`` or ``./datasets``. They are made on first use, in seconds, and are
the same bytes for the same seed.
"""

import contextlib
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
NUM_IMAGES = (4000, 200)  # of each split; fewer scenes are learned by heart
SEED = 0
VERSION = "1.1"  # raise it whenever a change in the scenes changes a pixel or a box
MAKER = "fcos_d2.data.digits"  # a folder without this mark is somebody's and stays untouched

logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """All that decides what the files contain."""

    num_images: tuple[int, int]  # of each split
    seed: int = SEED
    version: str = VERSION


def default_root() -> Path:
    """The folder in which detectron2 looks for datasets."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def image_folder(root: str | os.PathLike, split: str) -> Path:
    """Where the images of ``split`` ("train" or "val") are."""
    return Path(root) / "digits" / split


def annotation_file(root: str | os.PathLike, split: str) -> Path:
    """Where the COCO file of ``split`` is."""
    return Path(root) / "digits" / "annotations" / f"digits_{split}.json"


def ensure_digits(root: str | os.PathLike, recipe: Recipe | None = None) -> Path:
    """Makes the datasets unless they are there, complete and of this version.

    Any number of processes may call this at once: one makes them, the others wait and use them.

    Args:
        root: the folder that holds (will hold) ``digits/``.
        recipe: exactly what is wanted. None accepts any number of images that somebody asked for
            by hand, and makes the full set where there is none.

    Returns:
        the folder ``root/digits``.

    Raises:
        InputError: it cannot be written, or a folder of that name is not ours.
    """
    folder = Path(root) / "digits"
    if _is_usable(Path(root), recipe):
        return folder
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):  # a process that dies lets go of it by itself
            if not _is_usable(Path(root), recipe):
                _make(Path(root), recipe or Recipe(NUM_IMAGES))
    except OSError as error:
        raise InputError(
            f"digits: cannot write {folder} ({error.strerror or error}); "
            "set DETECTRON2_DATASETS to a folder that can be written"
        ) from error
    return folder


def _is_usable(root: Path, recipe: Recipe | None) -> bool:
    found = _read_recipe(root)
    if found is None:
        return False
    if recipe is not None:
        return found == recipe
    if (found.version, found.seed) != (VERSION, SEED):
        return False
    if found.num_images != NUM_IMAGES:
        logger.warning(
            f"{root / 'digits'} holds only {found.num_images} images, as somebody asked for by "
            f"hand; for all {NUM_IMAGES}: python -m {MAKER} --root {root}"
        )
    return True


def _read_recipe(root: Path) -> Recipe | None:
    """What the complete datasets under ``root`` were made from; None if they are not complete."""
    recipes = []
    for split in SPLITS:
        try:
            info = json.loads(annotation_file(root, split).read_text())["info"]
            recipe = Recipe(tuple(info["num_images"]), info["seed"], info["version"])
            num_files = len(os.listdir(image_folder(root, split)))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if num_files < recipe.num_images[SPLITS.index(split)]:
            return None
        recipes.append(recipe)
    return recipes[0] if recipes[0] == recipes[1] else None


def _make(root: Path, recipe: Recipe) -> None:
    """Writes everything beside the final folder, then moves it there in one step."""
    folder = root / "digits"
    _check_ours(root)
    start = time.perf_counter()
    for leftover in root.glob(".digits-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".digits-") as temporary:
        for split, num_images in zip(SPLITS, recipe.num_images, strict=True):
            _write_split(Path(temporary), split, num_images, recipe)
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        (Path(temporary) / "digits").rename(folder)
    seconds = time.perf_counter() - start
    logger.info(f"made {sum(recipe.num_images)} images in {folder} in {seconds:.1f} s")


def _check_ours(root: Path) -> None:
    """Refuses to replace a folder that this module did not make."""
    folder = root / "digits"
    if not folder.exists() or not any(folder.iterdir()):
        return
    for split in SPLITS:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(annotation_file(root, split).read_text())["info"]["made_by"] == MAKER:
                return
    raise InputError(
        f"digits: {folder} exists and is not the built-in dataset; move it away or set "
        "DETECTRON2_DATASETS to another folder"
    )


def _write_split(root: Path, split: str, num_images: int, recipe: Recipe) -> None:
    image_folder(root, split).mkdir(parents=True)
    annotation_file(root, split).parent.mkdir(exist_ok=True)
    handwriting = load_handwriting(split, recipe.seed)
    images, annotations = [], []
    for index in range(num_images):
        image, found = _write_image(root, split, index, handwriting, recipe.seed)
        images.append(image)
        annotations += found
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    content = _description(split, recipe) | {"images": images, "annotations": annotations}
    annotation_file(root, split).write_text(json.dumps(content))


def _write_image(
    root: Path, split: str, index: int, handwriting: Handwriting, seed: int
) -> tuple[dict, list[dict]]:
    """Writes one image; its COCO record and those of its digits, which lack an id yet."""
    # One generator per image: an image does not depend on how many others are made, nor on order.
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = compose_scene(handwriting, rng)
    name = f"{index + 1:06d}.png"
    # Noise hardly compresses: level 1 is three times as fast as the default and 10 percent larger.
    Image.fromarray(scene.image).save(image_folder(root, split) / name, compress_level=1)
    image = {"id": index + 1, "file_name": name, "width": SIZE, "height": SIZE, "license": 1}
    annotations = []
    for (x0, y0, x1, y1), label, source in zip(
        scene.boxes.tolist(), scene.labels.tolist(), scene.sources.tolist(), strict=True
    ):
        annotations.append(
            {
                "image_id": index + 1,
                "category_id": label + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "handwritten_digit": source,
            }
        )
    return image, annotations


def _description(split: str, recipe: Recipe) -> dict:
    """The parts of the annotation file that say what it is; no date, so that bytes can repeat."""
    return {
        "info": {
            "description": f"digits_{split}: detection scenes composed of handwritten digits",
            "version": recipe.version,
            "contributor": "fcos_d2",
            "url": "https://scikit-learn.org/stable/datasets/toy_dataset.html",
            "made_by": MAKER,
            "seed": recipe.seed,
            "num_images": list(recipe.num_images),
        },
        "licenses": [
            {
                "id": 1,
                "name": "Handwriting: UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
                "url": "https://creativecommons.org/licenses/by/4.0/",
            }
        ],
        "categories": [
            {"id": number, "name": name, "supercategory": "digit"}
            for number, name in enumerate(CLASSES, 1)
        ],
    }
