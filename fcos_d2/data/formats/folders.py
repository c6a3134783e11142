"""Recognizes the annotations in a folder: their formats, their splits, and the image folders."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from ...errors import InputError
from ..image_files import locate_images
from ..images import is_image
from .files import read_json, read_xml, read_yaml
from .json_files import UPLOADED, detect_format, to_coco
from .yolo import yolo_splits

MAX_DEPTH = 4  # of subfolders
SPLITS = {"train": r"train(ing)?", "val": r"val(id|idation)?|dev", "test": r"test(ing)?"}
MAX_IMAGES = 50  # images of an annotation file that the image folder must contain


def recognize(folder: Path) -> dict[str, dict]:
    """Recognizes the annotations in a folder.

    Returns:
        "train", "val", "test", "trainval" or "all" -> entry of DATASETS.REGISTER.

    Raises:
        InputError: there are no annotations of a known format.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; specify the one with images and annotations")
    files = list(_walk(folder))
    found = _find_yolo(files) or _find_xml(folder, files) or _find_json(folder, files)
    if found:
        return found
    kinds = Counter(path.suffix.lower() or "no suffix" for path in files).most_common(5)
    formats = [f"{p}: {detect_format(read_json(p))}" for p in files if p.suffix == ".json"][:3]
    raise InputError(
        f"{folder} contains no annotations of a known format, but {len(files)} files ("
        f"{', '.join(f'{count} {suffix}' for suffix, count in kinds)}); {'; '.join(formats)}"
    )


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        is_deep = len(Path(parent).relative_to(folder).parts) >= MAX_DEPTH
        folders[:] = [] if is_deep else sorted(name for name in folders if name[0] != ".")
        yield from (Path(parent, name) for name in sorted(names) if name[0] != ".")


def _find_split(path: Path, folder: Path) -> str:
    """Returns the last split in a path below ``folder``, or "all" if there is none."""
    words = "/".join(path.relative_to(folder).parts).lower()
    found = [
        (match.start(), split)
        for split, pattern in SPLITS.items()
        for match in re.finditer(rf"(?<![a-z])({pattern})(?![a-z])", words)
    ]
    return max(found)[1] if found else "all"


def _find_yolo(files: Sequence[Path]) -> dict[str, dict]:
    for path in files:
        if path.suffix in (".yaml", ".yml") and "names" in (_try_read(read_yaml, path) or ()):
            return {split: {"yolo": str(path), "split": split} for split in yolo_splits(path)}
    for path in files:
        if path.name in ("classes.txt", "obj.names"):
            in_labels = path.parent.name.lower() == "labels"
            return {"all": {"yolo": str(path.parent.parent if in_labels else path.parent)}}
    return {}


def _try_read(read: Callable, path: Path):
    """Reads a file; returns None if that fails."""
    try:
        return read(path)
    except InputError:
        return None


def _find_xml(folder: Path, files: Sequence[Path]) -> dict[str, dict]:
    kinds: dict[str, dict[Path, Path]] = {"annotation": {}, "annotations": {}}
    for path in files:
        if path.suffix.lower() == ".xml" and path.parent not in kinds["annotation"]:
            root = _try_read(read_xml, path)
            if root is not None and root.tag in kinds:
                kinds[root.tag].setdefault(path.parent, path)
    entries: dict[str, dict] = {}
    for path in kinds["annotations"].values():
        images = _find_image_folder(path.parent, folder, [])
        entries[_find_split(path, folder)] = {"cvat": str(path), "images": images}
    for xml in kinds["annotation"]:
        lists = [p for p in files if p.parent.name == "Main" and p.parent.parents[1] == xml.parent]
        root = xml if any(map(is_image, xml.iterdir())) else xml.parent
        for path in lists:
            if path.stem in (*SPLITS, "trainval"):
                entries[path.stem] = {"voc": str(root), "split": path.stem}
        if not lists:
            entries[_find_split(xml, folder)] = {"voc": str(root)}
    return entries


def _find_json(folder: Path, files: Sequence[Path]) -> dict[str, dict]:
    """Prefers COCO's instances_*.json to its other files, and clean files to the originals."""
    paths = [p for p in files if p.suffix == ".json" or p.name.endswith(".json.gz")]
    paths = [p for p in paths if p.with_name(f"{p.stem}_clean.json") not in paths]
    if instances := [p for p in paths if p.name.startswith("instances_")]:
        paths = instances
    entries: dict[str, dict] = {}
    for path in paths:
        content = read_json(path)
        coco = to_coco(content)
        if coco is None:
            continue
        # LabelMe writes one file per image; the entry specifies their folder.
        place = str(path.parent if detect_format(content) == "LabelMe" else path)
        entry = entries.setdefault(_find_split(path, folder), {"json": [], "images": []})
        if place not in entry["json"]:
            images = [i.get("file_name") for i in coco.get("images", ()) if isinstance(i, dict)]
            names = [name for name in images if isinstance(name, str)][:MAX_IMAGES]
            entry["json"].append(place)
            entry["images"].append(_find_image_folder(path.parent, folder, names))
            if classes := _drop_supercategories(coco.get("categories")):
                entry["classes"] = classes
    for entry in entries.values():
        if len(entry["json"]) == 1:
            entry |= {key: entry[key][0] for key in ("json", "images")}
    return entries


def _drop_supercategories(categories: object) -> list[str]:
    """Returns the classes without supercategories that Roboflow lists; empty if there are none."""
    items = categories if isinstance(categories, list) else []
    pairs = [(c.get("name"), c.get("supercategory")) for c in items if isinstance(c, dict)]
    groups = {name for name, group in pairs if group == "none"} & {group for _, group in pairs}
    return [name for name, _ in pairs if name not in groups] if groups else []


def _find_image_folder(parent: Path, folder: Path, names: Sequence[str]) -> str:
    """Returns the folder to which ``names`` are relative, or by default an images folder."""
    usual = [parent / "images", folder / "images"]
    near = [path for path in sorted(folder.rglob("*")) if path.is_dir()][:200]
    candidates = [path for path in (parent, *usual, *near, folder) if path.is_dir()]
    exact = (c for c in candidates if all((c / name).is_file() for name in names))
    moved = (c for c in candidates if not locate_images(str(c), names).missing)
    plain = [UPLOADED.sub(r"\1", name.rpartition("/")[2]) for name in names]
    uploaded = (c for c in candidates if all((c / name).is_file() for name in plain))
    found = chain(exact, moved, uploaded) if names else (path for path in usual if path.is_dir())
    return str(next(found, folder))
