"""Entries of DATASETS.REGISTER: datasets defined in the config instead of registered in Python.

``formats`` reads the files, and ``review`` repairs their defects. This module combines files,
selects, renames and merges classes, and selects a part of the images.
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
from functools import cache
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

KINDS = {"json": "images", "cvat": "images", "voc": "split", "yolo": "split"}  # kind -> another key
COMMON_KEYS = {"part", "classes", "rename", "upright"}
NAME = re.compile(r"\w[\w.-]*")  # is a safe file name
MAX_NAME_LENGTH = 200  # bytes
EXAMPLES = (
    "write {json: annotations.json, images: image_folder}, {yolo: data.yaml, split: train}, "
    "{voc: folder, split: train} or {cvat: annotations.xml, images: image_folder}; "
    "docs/custom_data.md lists all formats and keys"
)
# Suffixes of augmented copies of an image.
AUGMENTED = re.compile(
    r"(_(jpe?g|png|bmp|webp))?\.rf\.[0-9a-f]+$|[_-](aug|copy|flip|rot)[_-]?\d*$", re.I
)


# ---- Entries ----


def check_entry(name: object, entry: object) -> str:
    """Validates an entry of DATASETS.REGISTER and returns its kind, a key of ``KINDS``.

    Raises:
        InputError: the entry or its name is invalid.
    """
    is_name = isinstance(name, str) and NAME.fullmatch(name)
    if not is_name or len(name.encode()) > MAX_NAME_LENGTH:
        raise InputError(
            f"DATASETS.REGISTER has the invalid name {format_value(name, quote=True)}; use up to "
            f"{MAX_NAME_LENGTH} bytes of letters, digits, '_', '-' and '.', not starting with '-' "
            "or '.'"
        )
    place = f"DATASETS.REGISTER.{name}"
    if not isinstance(entry, Mapping) or len(kinds := KINDS.keys() & entry.keys()) != 1:
        got = format_value(entry, quote=True)
        raise InputError(f"{place} must specify where the data is, got {got}; {EXAMPLES}")
    (kind,) = kinds
    if KINDS[kind] == "images" and "images" not in entry:
        raise InputError(f"{place} has no 'images'; {EXAMPLES}")
    for key, value in entry.items():
        if key not in {kind, KINDS[kind], *COMMON_KEYS}:
            key = format_value(key, quote=True)
            raise InputError(f"{place} has an unknown key {key}; {EXAMPLES}")
        is_valid, expected = VALUES[key]
        if not is_valid(value):
            got = format_value(value, quote=True)
            raise InputError(f"{place}.{key} must be {expected}, got {got}")
    if len(_as_list(entry.get("images", ""))) not in (1, len(_as_list(entry[kind]))):
        raise InputError(f"{place}.images must be one folder, or one folder per item of {kind}")
    return kind


def _as_list(value: object) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _are_paths(value: object) -> bool:
    return bool(_as_list(value)) and all(isinstance(path, str) for path in _as_list(value))


def _are_voc_folders(value: object) -> bool:
    return bool(_as_list(value)) and all(
        isinstance(v, str) or (_is_map(v) and set(v) == {"xml", "images"}) for v in _as_list(value)
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


VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(["json", "cvat", "yolo", "images"], (_are_paths, "a path or a list of paths")),
    "voc": (_are_voc_folders, "a folder or {xml: folder, images: folder}"),
    "part": (_is_part, "two fractions such as [0, 0.8], or a file with image names"),
    "classes": (_are_names, "a list of unique names"),
    "rename": (_is_map, "a mapping such as {old: new}"),
    "upright": (lambda value: isinstance(value, bool), "true or false"),
    "split": (lambda value: isinstance(value, str), "a name"),
}


def expand(text: str) -> str:
    """Expands ``~`` and environment variables in a path."""
    return os.path.expandvars(os.path.expanduser(text))


# ---- Annotations ----


def read_sources(name: str, entry: Mapping) -> list[Source]:
    """Reads the annotation files of an entry, and caches those of formats with many files.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    kind = check_entry(name, entry)
    if kind == "json" and not any(os.path.isdir(expand(path)) for path in _as_list(entry[kind])):
        return _read_sources(kind, entry)
    path = _cache_file(name)
    if path.is_file():
        return [Source(*source) for source in json.loads(path.read_text())]
    sources = _read_sources(kind, entry)
    path.write_text(json.dumps(sources))
    return sources


def clear_cache(name: str) -> None:
    """Makes ``read_sources`` read the files of an entry again."""
    _cache_file(name).unlink(missing_ok=True)


def _cache_file(name: str) -> Path:
    return Path(_cache_folder().name, f"{name}.json")


@cache
def _cache_folder() -> tempfile.TemporaryDirectory:
    """Creates a folder that is deleted when the process exits."""
    return tempfile.TemporaryDirectory(prefix="fcos_d2_datasets_")


def _read_sources(kind: str, entry: Mapping) -> list[Source]:
    places, folders = _as_list(entry[kind]), _as_list(entry.get("images", ""))
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
            sources += [read_annotations(path, folder) for path in _expand_glob(place)]
    return sources


def _expand_glob(pattern: str) -> list[str]:
    if os.path.exists(pattern) or "\0" in pattern:
        return [pattern]
    return sorted(glob.glob(pattern)) or [pattern]


def review_entry(sources: Sequence[Source], entry: Mapping, masks: bool = False) -> Review:
    """Reviews the annotations of an entry, and selects its classes and its part of the images.

    Raises:
        InputError: a file contains no annotations, or the entry does not match it.
    """
    reviews, upright = [], entry.get("upright", True)
    part = image_filter(entry["part"]) if "part" in entry else None
    for source in sources:
        try:
            review = review_coco(source.content, source.image_root, masks, upright, part)
        except InputError as error:
            raise InputError(f"{source.file}: {error}") from error
        if len(sources) > 1:
            problems = [Problem(k, f"{source.file}: {text}") for k, text in review.problems]
            review = review._replace(problems=problems)
        reviews.append(review)
    review = reviews[0] if len(reviews) == 1 else _combine(reviews)
    content = select_classes(review.content, entry, sources[0].file)
    for image in () if upright else content["images"]:
        image["upright"] = False
    if "part" in entry and not content["images"]:
        part = format_value(entry["part"])
        raise InputError(f"part {part} contains no images of {sources[0].file}; enlarge it")
    return review._replace(content=content)


def _combine(reviews: Sequence[Review]) -> Review:
    """Combines several files: merges classes by name, and renumbers images and annotations."""
    images, annotations, names = [], [], {}
    repaired, problems, missing = Counter(), [], {}
    for review in reviews:
        numbers = {}
        for image in review.content["images"]:
            numbers[image["id"]] = image["id"] = len(images) + 1
            images.append(image)
        categories = _sort_by_id(review.content["categories"])
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
    """Returns the class names of an entry in the order of the model's classes.

    Raises:
        InputError: see ``review_entry``.
    """
    reduced = []
    for source in sources:
        images = source.content.get("images")
        images = images[:1] if isinstance(images, list) else images
        content = {**source.content, "images": images, "annotations": []}
        reduced.append(source._replace(content=content))
    entry = {key: entry[key] for key in ("classes", "rename") if key in entry}
    content = review_entry(reduced, entry).content
    return [category["name"] for category in _sort_by_id(content["categories"])]


def _sort_by_id(categories: Sequence[dict]) -> list[dict]:
    return sorted(categories, key=lambda category: category["id"])


def select_classes(content: dict, entry: Mapping, file: str) -> dict:
    """Applies ``rename`` and ``classes`` of an entry.

    Raises:
        InputError: a class in ``rename`` or all in ``classes`` are unknown, or classes have the
            same name.
    """
    rename, selected = entry.get("rename", {}), entry.get("classes")
    categories = _sort_by_id(content["categories"])
    groups = _group_by_name(categories, rename, file)
    if not rename and selected is None:
        return content
    names = list(groups) if selected is None else list(selected)
    if not groups.keys() & set(names):
        known = format_value(", ".join(category["name"] for category in categories))
        raise InputError(
            f"{file} has none of the classes {format_value(names)}; its classes are {known}"
        )
    ids = {c["id"]: names.index(n) + 1 for n, g in groups.items() if n in names for c in g}
    result = {**content, "categories": [{"id": i, "name": n} for i, n in enumerate(names, 1)]}
    if "annotations" in content:
        kept = [a for a in content["annotations"] if a["category_id"] in ids]
        for annotation in kept:
            annotation["category_id"] = ids[annotation["category_id"]]
        result["annotations"] = kept
    return result


def _group_by_name(
    categories: Sequence[dict], rename: Mapping[str, str], file: str
) -> dict[str, list[dict]]:
    """Groups categories that have the same name after renaming."""
    known = [category["name"] for category in categories]
    for name in rename:
        if name not in known:
            advice = format_value(suggest(name, known, f"it has {', '.join(known)}"))
            raise InputError(f"{file}: {format_value(name)} in rename is not a class; {advice}")
    groups: dict[str, list[dict]] = {}
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
    return groups


# ---- Parts ----


def image_filter(part: Sequence[float] | str) -> Callable[[str], bool]:
    """Returns a function that tells whether an image belongs to a part, given its file name.

    Disjoint ranges select disjoint images, new images do not move others to another part, and
    augmented copies of an image stay together.

    Args:
        part: [low, high) for images whose ``hash_fraction`` is in this range; the path of a file
            with one image name per line; or "not " and such a path, for all other images.
    """
    if not isinstance(part, str):
        low, high = part
        return lambda name: low <= hash_fraction(name) < high
    lines = read_text(expand(part.removeprefix("not "))).splitlines()
    listed, is_other = {line.strip() for line in lines}, part.startswith("not ")
    return lambda name: (name in listed) != is_other


def original_name(file_name: str) -> str:
    """Returns the name of an image without the suffix of augmented copies."""
    path = Path(file_name.replace("\\", "/"))
    stem = AUGMENTED.sub("", path.stem)
    return file_name if stem == path.stem else str(path.with_name(stem))


def hash_fraction(file_name: str) -> float:
    """Hashes the original name of an image to a uniformly distributed number in [0, 1)."""
    text = original_name(file_name).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48
