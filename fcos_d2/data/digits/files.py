"""The built-in datasets ``digits_train`` and ``digits_val`` on disk, in COCO format.

``ROOT/digits/{train,val}/NNNNNN.png`` and ``ROOT/digits/annotations/digits_{train,val}.json``;
ROOT is ``$DETECTRON2_DATASETS`` or ``./datasets``. They are generated on first use, in seconds, and
are the same bytes for the same seed.
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
    """Generates the datasets unless they are there, complete and of this version.

    Any number of processes may call this at once: one generates them, the others wait.

    Args:
        root: the folder that holds (will hold) ``digits/``.
        recipe: exactly what is wanted. None accepts any number of images that somebody asked for
            by hand, and generates the full set where there is none.

    Returns:
        the folder ``root/digits``.

    Raises:
        InputError: it cannot be written, or a folder of that name is not ours.
    """
    root = Path(root)
    folder = root / "digits"
    if _is_usable(root, recipe):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):  # a process that dies lets go of it by itself
            if not _is_usable(root, recipe):
                _generate(root, recipe or Recipe(NUM_IMAGES))
    except OSError as error:
        raise InputError(
            f"digits: cannot write {folder} ({error.strerror or error}); "
            "set DETECTRON2_DATASETS to a folder that can be written"
        ) from error
    return folder


def _is_usable(root: Path, recipe: Recipe | None) -> bool:
    found = _read_recipe(root)
    if found is None or recipe is not None:
        return found is not None and found == recipe
    is_current = (found.version, found.seed) == (VERSION, SEED)
    if is_current and found.num_images != NUM_IMAGES:
        logger.warning(
            f"{root / 'digits'} holds only {found.num_images} images, as somebody asked for by "
            f"hand; for all {NUM_IMAGES}: python -m {MAKER} --root {root}"
        )
    return is_current


def _read_recipe(root: Path) -> Recipe | None:
    """What the datasets under ``root`` were generated from; None if they are not complete."""
    infos = [_read_info(root, split) for split in SPLITS]
    try:
        found = [Recipe(tuple(i["num_images"]), i["seed"], i["version"]) for i in infos]
        counts = [len(os.listdir(image_folder(root, split))) for split in SPLITS]
    except (OSError, KeyError, TypeError):
        return None
    is_complete = all(count >= n for count, n in zip(counts, found[0].num_images, strict=True))
    return found[0] if is_complete and found[0] == found[1] else None


def _read_info(root: Path, split: str) -> dict:
    """What the annotation file of a split says about itself; empty if there is none."""
    try:
        return json.loads(annotation_file(root, split).read_text())["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _generate(root: Path, recipe: Recipe) -> None:
    """Writes everything beside the final folder, then moves it there in one step."""
    folder, start = root / "digits", time.perf_counter()
    is_ours = any(_read_info(root, split).get("made_by") == MAKER for split in SPLITS)
    if folder.exists() and any(folder.iterdir()) and not is_ours:
        raise InputError(
            f"digits: {folder} exists and is not the built-in dataset; move it away or set "
            "DETECTRON2_DATASETS to another folder"
        )
    for leftover in root.glob(".digits-*"):  # of a process that was killed: we hold the lock
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
    """Writes one image; returns the annotations of its digits, without ids."""
    # One generator per image: an image does not depend on how many others are made, nor on order.
    scene = compose_scene(handwriting, np.random.default_rng([seed, SPLITS.index(split), index]))
    path = image_folder(root, split) / f"{index + 1:06d}.png"
    # Noise hardly compresses: level 1 is three times as fast as the default and 10 percent larger.
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
    """What the annotation file says about itself; no date, so that bytes can repeat."""
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
