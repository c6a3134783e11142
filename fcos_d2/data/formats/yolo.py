"""Reads YOLO datasets: a ``data.yaml``, and a label file in ``labels/`` per image in ``images/``.

Each line of a label file has a class number, and the center x, center y, width and height of a box
or the points of a polygon, relative to the size of the image.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError, format_value
from ..images import image_sizes, is_image
from .builder import Builder, Source, enclosing_box
from .files import read_text, read_yaml

MAX_FRACTION = 2.0  # larger values are pixels


def read_yolo(path: str | Path, split: str | None = None, upright: bool = True) -> Source:
    """Reads a YOLO dataset or one of its splits.

    Args:
        path: data.yaml, its folder, or a folder of images and labels with a classes.txt.
        split: "train", "val" or "test"; None reads all images under the folder.
        upright: apply the EXIF orientation of images.

    Raises:
        InputError: a file or folder is missing, or there are no class names.
    """
    path = Path(path)
    config = path / "data.yaml" if (path / "data.yaml").is_file() else path
    root = config if config.is_dir() else config.parent
    settings = {} if config.is_dir() else read_yaml(config)
    names = _class_names(settings, root, config)
    places = [root] if split is None else _split_places(settings, root, split, config)
    images = list(dict.fromkeys(image for place in places for image in _images(place, config)))
    if not images:
        raise InputError(f"{config}: no images in {', '.join(map(str, places))}")
    builder, has_keypoints = Builder(names), "kpt_shape" in settings
    labeled = []
    for image in images:
        name = os.path.relpath(image, root).replace(os.sep, "/")
        labeled.append(_add_image(builder, image, name, names, upright, has_keypoints))
    if not any(labeled):
        raise InputError(
            f"{config}: no image has a label file, such as {_label_file(images[0])} for {images[0]}"
        )
    return Source(str(root / (split or "yolo")), str(root), builder.content())


def yolo_splits(path: str | Path) -> list[str]:
    """Returns the splits in a data.yaml, "train", "val" or "test", whose images exist."""
    path, found = Path(path), []
    settings = read_yaml(path)
    for split in ("train", "val", "test"):
        with contextlib.suppress(InputError):
            if _split_places(settings, path.parent, split, path):
                found.append(split)
    return found


def _class_names(settings: dict, root: Path, config: Path) -> list[str]:
    names = settings.get("names")
    for file in ("classes.txt", "obj.names"):
        for folder in (root, root / "labels"):
            if names is None and (folder / file).is_file():
                names = [line for line in read_text(folder / file).splitlines() if line.strip()]
    if isinstance(names, dict):
        keys = sorted(names, key=lambda key: int(key) if str(key).isdecimal() else -1)
        if [str(key) for key in keys] != [str(number) for number in range(len(keys))]:
            raise InputError(f"{config}: 'names' must be numbered from 0 without gaps")
        names = [names[key] for key in keys]
    if not isinstance(names, list) or not names:
        raise InputError(f"{config}: class names are missing; add names: [first, second]")
    names = [str(name).strip() for name in names]
    if len(set(names)) < len(names):
        raise InputError(f"{config}: two classes have the same name ({format_value(names)})")
    return names


def _split_places(settings: dict, root: Path, split: str, config: Path) -> list[Path]:
    """Returns the image folders or image lists of a split."""
    value = settings.get(split, settings.get("valid") if split == "val" else None)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(value, str) for value in values):
        known = [key for key in ("train", "val", "test") if settings.get(key)]
        raise InputError(
            f"{config}: no split {split!r}; available splits: {', '.join(known) or 'none'}"
        )
    base = str(settings.get("path") or "")
    folders = [root / base, Path(base), root]
    return [_resolve(value, folders, config) for value in values]


def _resolve(value: str, folders: list[Path], config: Path) -> Path:
    text = value.replace("\\", "/")
    # Roboflow writes ../train/images instead of train/images.
    for relative in (text, text.removeprefix("../")):
        for folder in folders:
            if (folder / relative).exists():
                return folder / relative
    raise InputError(
        f"{config}: {format_value(value)} does not exist; correct the path in that file"
    )


def _images(place: Path, config: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from (p for p in sorted(place.rglob("*")) if is_image(p) and p.name[0] != ".")
        return
    for line in read_text(place).splitlines():
        if line.strip():
            yield _resolve(line.strip(), [place.parent, config.parent, Path()], place)


def _label_file(image: Path) -> Path:
    """Replaces the last ``images`` in the path of an image with ``labels``, and the suffix."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index].lower() == "images":
            parts[index] = "labels"
            labels = Path(*parts).with_suffix(".txt")
            if labels.is_file() or not image.with_suffix(".txt").is_file():
                return labels
            break
    return image.with_suffix(".txt")


def _add_image(
    builder: Builder, image: Path, name: str, names: list[str], upright: bool, has_keypoints: bool
) -> bool:
    """Adds an image and its objects; returns whether it has a label file."""
    labels = _label_file(image)
    try:
        width, height = image_sizes(str(image))[0 if upright else 1]
    except InputError as error:
        builder.add_broken_image(f"image {format_value(str(image))}: {error}")
        return labels.is_file()
    number = builder.add_image(name, width, height)
    if not labels.is_file():  # no objects
        return False
    for index, line in enumerate(read_text(labels).splitlines(), 1):
        if words := line.split():
            place = f"in line {index} of {labels.name}"
            try:
                label, box, polygon = _parse_object(words, names, (width, height), has_keypoints)
            except ValueError as error:
                builder.add_broken_object(number, str(error), place)
            else:
                builder.add_object(number, label, box, place, polygon=polygon)
    return True


def _parse_object(
    words: list[str], names: list[str], size: tuple[int, int], has_keypoints: bool
) -> tuple[str, list[float], list[float] | None]:
    """Returns class name, box [x, y, width, height] and polygon, if any, of a line.

    Raises:
        ValueError: the line is invalid; the message is for the user.
    """
    text = format_value(" ".join(words))
    try:
        number, *values = map(float, words)
        is_valid = number == int(number) and all(map(math.isfinite, values))
    except (ValueError, OverflowError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{text} is not a class number and coordinates")
    if not 0 <= number < len(names):
        raise ValueError(
            f"class {words[0]} is out of range for {len(names)} classes, starting at 0"
        )
    if len(values) < 4 or max(map(abs, values)) > MAX_FRACTION:
        raise ValueError(
            f"{text} is not a class, x, y, width and height relative to the image, 0 to 1"
        )
    label = names[int(number)]
    if len(values) < 6 or has_keypoints:  # a box, and possibly a score
        x, y, w, h = values[:4]
        return label, [(x - w / 2) * size[0], (y - h / 2) * size[1], w * size[0], h * size[1]], None
    polygon = [value * size[i % 2] for i, value in enumerate(values[: len(values) // 2 * 2])]
    return label, enclosing_box(zip(polygon[::2], polygon[1::2], strict=True)), polygon
