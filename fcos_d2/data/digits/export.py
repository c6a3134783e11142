"""Writes the digits as a custom dataset to practice on: other class names, and typical mistakes.

docs/custom_data.md uses it: ``FOLDER/photos``, and one annotation file, ``FOLDER/labels.json``.
"""

import json
import shutil
from pathlib import Path

from ...errors import InputError
from .files import annotation_file, ensure_digits, image_folder

# Zero to six, by their old names on dice; seven, eight and nine are not annotated.
NAMES = ("nil", "ace", "deuce", "trey", "cater", "cinque", "sice")
UNUSED = "joker"  # category without annotations
TRUNCATED = 0.4  # fraction of the bytes of the truncated image


def export(root: str | Path, folder: str | Path, num_images: int) -> Path:
    """Writes the first training images and their annotations under other names.

    One image file is truncated, one box has a negative width, and one category is unused.

    Args:
        root: parent folder of ``digits``, which is generated if it does not exist.
        folder: output folder; must not exist.
        num_images: at least 2.

    Returns:
        Path of the annotation file.

    Raises:
        InputError: the folder exists, or ``num_images`` is out of range.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} already exists; remove it or choose another folder")
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
    _add_mistakes(folder / "photos" / images[1]["file_name"], annotations)
    names = enumerate((*NAMES, UNUSED), 1)
    categories = [{"id": 10 * number, "name": name} for number, name in names]
    labels = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "labels.json"
    path.write_text(json.dumps(labels))
    return path


def _add_mistakes(photo: Path, annotations: list[dict]) -> None:
    content = photo.read_bytes()
    photo.write_bytes(content[: int(TRUNCATED * len(content))])
    x, y, width, height = annotations[0]["bbox"]
    annotations[0]["bbox"] = [x + width, y, -width, height]
