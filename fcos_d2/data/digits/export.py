"""The digits as somebody else's dataset: other names, gaps in the ids, and the usual accidents.

For trying out what users do with data of their own (docs/custom_data.md): ``FOLDER/photos`` and one
annotation file for everything, ``FOLDER/labels.json``.
"""

import json
import shutil
from pathlib import Path

from ...errors import InputError
from .files import annotation_file, ensure_digits, image_folder

# Zero to six, by their old names on dice; seven, eight and nine are not labeled. Nobody ever saw a
# joker.
NAMES = ("nil", "ace", "deuce", "trey", "cater", "cinque", "sice")
NEVER_USED = "joker"
CUT_OFF = 0.4  # of the bytes of the broken image are there


def export(root: str | Path, folder: str | Path, num_images: int) -> Path:
    """Writes the first training images with their labels under other names.

    Among them are an image file that is cut off, an annotation of negative width, and a category
    that is never used.

    Args:
        root: where the digits are, or are to be made.
        folder: to write; must not exist.
        num_images: at least 2.

    Returns:
        the annotation file.

    Raises:
        InputError: the folder exists, or there are fewer images.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; remove it or choose another folder")
    ensure_digits(root)
    content = json.loads(annotation_file(root, "train").read_text())
    if not 2 <= num_images <= len(content["images"]):
        raise InputError(
            f"--images must be from 2 to {len(content['images'])} for an export, got {num_images}"
        )
    images = content["images"][:num_images]
    (folder / "photos").mkdir(parents=True)
    for image in images:
        renamed = f"photo_{image['id']:04d}.png"
        shutil.copy(image_folder(root, "train") / image["file_name"], folder / "photos" / renamed)
        image["file_name"] = renamed
    annotations = [
        {**annotation, "category_id": 10 * annotation["category_id"]}
        for annotation in content["annotations"]
        if annotation["image_id"] <= num_images and annotation["category_id"] <= len(NAMES)
    ]
    _have_accidents(folder / "photos" / images[1]["file_name"], annotations)
    names = enumerate((*NAMES, NEVER_USED), 1)
    categories = [{"id": 10 * number, "name": name} for number, name in names]
    labels = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "labels.json"
    path.write_text(json.dumps(labels))
    return path


def _have_accidents(photo: Path, annotations: list[dict]) -> None:
    content = photo.read_bytes()
    photo.write_bytes(content[: int(CUT_OFF * len(content))])
    x, y, width, height = annotations[0]["bbox"]
    annotations[0]["bbox"] = [x + width, y, -width, height]
