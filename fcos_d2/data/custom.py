"""Entries of DATASETS.REGISTER: datasets described in the config instead of registered in Python.

``formats`` reads their files and ``review`` repairs their defects. This module selects, renames and
merges classes, joins several files, and selects a part of the images.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import cycle
from pathlib import Path

from ..errors import InputError, format_value, suggest
from .defects import Problem
from .formats.builder import Source
from .formats.files import read_text
from .formats.json_files import read_annotations
from .formats.xml_files import read_cvat, read_voc
from .formats.yolo import read_yolo
from .review import Review, review_coco

KINDS = {"json": "images", "cvat": "images", "voc": "split", "yolo": "split"}  # -> a further key
COMMON = {"part", "classes", "rename", "upright"}
NAME = re.compile(r"\w[\w.-]*")  # is safe as the name of a file
LONGEST_NAME = 200  # bytes
EXAMPLES = (
    "write {json: annotations.json, images: image_folder}, {yolo: data.yaml, split: train}, "
    "{voc: folder, split: train} or {cvat: annotations.xml, images: image_folder}; "
    "docs/custom_data.md lists all formats and keys"
)
# Suffixes by which augmented copies of one photo differ.
COPY = re.compile(
    r"(_(jpe?g|png|bmp|webp))?\.rf\.[0-9a-f]+$|[_-](aug|copy|flip|rot)[_-]?\d*$", re.I
)


# ---- descriptions ----


def check_entry(name: object, entry: object) -> str:
    """The kind of an entry of DATASETS.REGISTER, a key of ``KINDS``.

    Raises:
        InputError: it is not valid.
    """
    is_name = isinstance(name, str) and NAME.fullmatch(name)
    if not is_name or len(name.encode()) > LONGEST_NAME:
        raise InputError(
            f"DATASETS.REGISTER has the name {format_value(name, quote=True)}; use letters, "
            f"digits, '_', '-' and '.', but not '-' or '.' first, and at most {LONGEST_NAME} bytes"
        )
    place = f"DATASETS.REGISTER.{name}"
    if not isinstance(entry, Mapping) or len(kinds := KINDS.keys() & entry.keys()) != 1:
        got = format_value(entry, quote=True)
        raise InputError(f"{place} must say where the data is, got {got}; {EXAMPLES}")
    (kind,) = kinds
    if KINDS[kind] == "images" and "images" not in entry:
        raise InputError(f"{place} has no 'images'; {EXAMPLES}")
    for key, value in entry.items():
        if key not in {kind, KINDS[kind], *COMMON}:
            key = format_value(key, quote=True)
            raise InputError(f"{place} has an unknown key {key}; {EXAMPLES}")
        is_valid, expected = VALUES[key]
        if not is_valid(value):
            got = format_value(value, quote=True)
            raise InputError(f"{place}.{key} must be {expected}, got {got}")
    if len(_listed(entry.get("images", ""))) not in (1, len(_listed(entry[kind]))):
        raise InputError(f"{place}.images must be one folder, or one for each of {kind}")
    return kind


def _listed(value: object) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _are_paths(value: object) -> bool:
    return bool(_listed(value)) and all(isinstance(path, str) for path in _listed(value))


def _are_voc_folders(value: object) -> bool:
    return bool(_listed(value)) and all(
        isinstance(v, str) or (_is_map(v) and set(v) == {"xml", "images"}) for v in _listed(value)
    )


def _is_part(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    numbers = isinstance(value, Sequence) and all(isinstance(v, (int, float)) for v in value)
    return numbers and len(value) == 2 and 0 <= value[0] < value[1] <= 1


def _are_names(value: object) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(v, str) for v in value) and len(set(value)) == len(value) > 0


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(v, str) for kv in value.items() for v in kv
    )


PATHS = (_are_paths, "a path or a list of paths")
VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "json": PATHS,
    "cvat": PATHS,
    "yolo": PATHS,
    "images": PATHS,
    "voc": (_are_voc_folders, "a folder or {xml: folder, images: folder}"),
    "part": (_is_part, "two shares such as [0, 0.8], or a file with image names"),
    "classes": (_are_names, "a list of different names"),
    "rename": (_is_map, "a mapping such as {old: new}"),
    "upright": (lambda value: isinstance(value, bool), "true or false"),
    "split": (lambda value: isinstance(value, str), "a name"),
}


def expand(text: str) -> str:
    """A path with ``~`` and ``$VARIABLES`` replaced."""
    return os.path.expandvars(os.path.expanduser(text))


# ---- from a description to annotations ----


def read_sources(name: str, entry: Mapping) -> list[Source]:
    """Reads the annotation files of an entry; formats of many files only once per process.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    kind = check_entry(name, entry)
    if kind == "json" and not any(os.path.isdir(expand(path)) for path in _listed(entry[kind])):
        return _read_sources(kind, entry)
    path = Path(_scratch().name, f"{name}.json")
    if path.is_file():
        return [Source(*source) for source in json.loads(path.read_text())]
    sources = _read_sources(kind, entry)
    path.write_text(json.dumps(sources))
    return sources


def forget_sources(name: str) -> None:
    """Makes ``read_sources`` read the files of an entry again."""
    Path(_scratch().name, f"{name}.json").unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory:
    """Deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fcos_d2_datasets_")


def _read_sources(kind: str, entry: Mapping) -> list[Source]:
    places, folders = _listed(entry[kind]), _listed(entry.get("images", ""))
    split, upright, sources = entry.get("split"), entry.get("upright", True), []
    for place, folder in zip(places, map(expand, cycle(folders)), strict=False):
        if isinstance(place, Mapping):
            place = {key: expand(path) for key, path in place.items()}
        else:
            place = expand(place)
        if kind == "voc":
            sources.append(read_voc(place, split, all_classes="classes" not in entry))
        elif kind == "yolo":
            sources.append(read_yolo(place, split, upright))
        elif kind == "cvat":
            sources.append(read_cvat(place, folder))
        else:
            sources += [read_annotations(path, folder) for path in _matching(place)]
    return sources


def _matching(pattern: str) -> list[str]:
    if os.path.exists(pattern) or "\0" in pattern:
        return [pattern]
    return sorted(glob.glob(pattern)) or [pattern]


def review_entry(sources: Sequence[Source], entry: Mapping, masks: bool = False) -> Review:
    """Reviews the annotations of an entry, with its classes and its part of the images.

    Raises:
        InputError: a file does not contain annotations, or the entry does not fit it.
    """
    reviews, upright = [], entry.get("upright", True)
    part = chooser(entry["part"]) if "part" in entry else None
    for source in sources:
        try:
            review = review_coco(source.content, source.image_root, masks, upright, part)
        except InputError as error:
            raise InputError(f"{source.file}: {error}") from error
        if len(sources) > 1:
            problems = [Problem(k, f"{source.file}: {text}") for k, text in review.problems]
            review = review._replace(problems=problems)
        reviews.append(review)
    review = reviews[0] if len(reviews) == 1 else _joined(reviews)
    content = choose_classes(review.content, entry, sources[0].file)
    for image in () if upright else content["images"]:
        image["upright"] = False
    if "part" in entry and not content["images"]:
        part = format_value(entry["part"])
        raise InputError(f"part {part} contains no image of {sources[0].file}; widen it")
    return review._replace(content=content)


def _joined(reviews: Sequence[Review]) -> Review:
    """Joins several files: classes are merged by name, and images renumbered."""
    images, annotations, names = [], [], {}
    repaired, problems, missing = Counter(), [], {}
    for review in reviews:
        numbers = {}
        for image in review.content["images"]:
            numbers[image["id"]] = image["id"] = len(images) + 1
            images.append(image)
        categories = _by_id(review.content["categories"])
        classes = {c["id"]: names.setdefault(c["name"], len(names) + 1) for c in categories}
        for annotation in review.content.get("annotations", ()):
            annotation["id"] = len(annotations) + 1
            annotation["image_id"] = numbers[annotation["image_id"]]
            annotation["category_id"] = classes[annotation["category_id"]]
            annotations.append(annotation)
        repaired.update(review.repaired)
        problems += review.problems
        missing |= review.missing
    categories = [{"id": number, "name": name} for name, number in names.items()]
    content = {"images": images, "categories": categories, "annotations": annotations}
    count = sum(review.num_annotations for review in reviews)
    return Review(content, repaired, problems, missing, count)


def class_names_of(sources: Sequence[Source], entry: Mapping) -> list[str]:
    """Class names of an entry in the order of the model's classes.

    Raises:
        InputError: as ``review_entry``.
    """
    small = []
    for source in sources:
        images = source.content.get("images")
        images = images[:1] if isinstance(images, list) else images
        content = {**source.content, "images": images, "annotations": []}
        small.append(source._replace(content=content))
    entry = {key: entry[key] for key in ("classes", "rename") if key in entry}
    content = review_entry(small, entry).content
    return [category["name"] for category in _by_id(content["categories"])]


def _by_id(categories: Sequence[dict]) -> list[dict]:
    return sorted(categories, key=lambda category: category["id"])


def choose_classes(content: dict, entry: Mapping, file: str) -> dict:
    """Applies ``rename`` and ``classes`` of an entry.

    Raises:
        InputError: they name unknown classes, or several classes have the same name.
    """
    rename, wanted = entry.get("rename", {}), entry.get("classes")
    categories = _by_id(content["categories"])
    known = [category["name"] for category in categories]
    for name in rename:
        if name not in known:
            advice = format_value(suggest(name, known, f"it has {', '.join(known)}"))
            raise InputError(
                f"{file}: rename names {format_value(name)}, which is not a class; {advice}"
            )
    groups: dict[str, list] = {}
    for category in categories:
        groups.setdefault(rename.get(category["name"], category["name"]), []).append(category)
    for name, group in groups.items():
        if len(group) > 1 and not any(category["name"] in rename for category in group):
            ids = " and ".join(format_value(category["id"]) for category in group[:2])
            name = format_value(name)
            raise InputError(
                f"{file}: categories {ids} have the same name {name}; to merge them, set "
                f"rename: {{{name}: {name}}} in DATASETS.REGISTER"
            )
    if not rename and wanted is None:
        return content
    names = list(groups) if wanted is None else list(wanted)
    if not groups.keys() & set(names):
        known = format_value(", ".join(known))
        raise InputError(
            f"{file}: it has none of the classes {format_value(names)}; its classes are {known}"
        )
    ids = {c["id"]: names.index(n) + 1 for n, g in groups.items() if n in names for c in g}
    result = {**content, "categories": [{"id": i, "name": n} for i, n in enumerate(names, 1)]}
    if "annotations" in content:
        chosen = [a for a in content["annotations"] if a["category_id"] in ids]
        for annotation in chosen:
            annotation["category_id"] = ids[annotation["category_id"]]
        result["annotations"] = chosen
    return result


# ---- a share of the images ----


def chooser(part: Sequence[float] | str) -> Callable[[str], bool]:
    """A function that tells whether an image belongs to a part, by its file name.

    Parts that do not overlap share no image, adding images moves none from one part to another, and
    augmented copies of one photo stay together.

    Args:
        part: [low, high) for images whose ``share`` is in this range; the path of a file with one
            image name per line; or "not " and such a path, for all other images.
    """
    if not isinstance(part, str):
        low, high = part
        return lambda name: low <= share(name) < high
    lines = read_text(expand(part.removeprefix("not "))).splitlines()
    listed, is_other = {line.strip() for line in lines}, part.startswith("not ")
    return lambda name: (name in listed) != is_other


def photo(file_name: str) -> str:
    """The name of the photo of which an image may be an augmented copy."""
    path = Path(file_name.replace("\\", "/"))
    stem = COPY.sub("", path.stem)
    return file_name if stem == path.stem else str(path.with_name(stem))


def share(file_name: str) -> float:
    """A number in [0, 1), uniformly distributed over photos."""
    text = photo(file_name).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48
