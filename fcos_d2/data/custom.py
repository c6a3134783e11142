"""The user's own data sets, described in the config instead of registered in Python.

COCO: an annotation file and the folder its file names start from; ``part`` takes a share of the
images, so that one file serves for training and validation. Pascal VOC: the folder that holds
``Annotations``, ``ImageSets/Main`` and ``JPEGImages``. Class names always come from the data.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import InputError, format_value, one_line_cause
from . import digits
from .annotation_checks import problems_in_coco_annotations, read_coco
from .images import is_image
from .records import coco_records, set_classes

KEYS = {"json": {"json", "images", "part"}, "voc": {"voc", "split", "classes"}}
NAME = re.compile(r"\w[\w.-]*")  # is safe as the name of a file
LONGEST_NAME = 200  # bytes
EXAMPLES = (
    "write {json: annotations.json, images: image_folder} (optionally part: [0, 0.8], the share of "
    "the images) or {voc: folder, split: train} (optionally classes: [names])"
)


def register_datasets(entries: Mapping[str, Mapping]) -> None:
    """Gives every entry of DATASETS.REGISTER its name in detectron2's catalogs; opens no file.

    Args:
        entries: by name, ``{json, images[, part]}`` or ``{voc, split[, classes]}``. Paths are
            relative to the working directory; ``~`` and ``$VARIABLES`` are replaced.

    Raises:
        InputError: an entry without what it needs, or of a name that is taken or could not name a
            file.
    """
    for name, entry in entries.items():
        kind = _check_entry(name, entry)
        if name in DatasetCatalog:
            if not MetadataCatalog.get(name).get("described"):
                raise InputError(
                    f"DATASETS.REGISTER.{name}: a data set of this name exists already; "
                    "choose another name"
                )
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(load_coco, name))
        metadata = MetadataCatalog.get(name)
        metadata.set(evaluator_type="coco", described=dict(entry))
        if kind == "voc":
            metadata.set(image_root=str(_path(entry["voc"]) / "JPEGImages"))
        else:
            metadata.set(image_root=str(_path(entry["images"])))
            metadata.set(source_file=str(_path(entry["json"])))
        if kind == "json" and "part" not in entry:
            metadata.set(json_file=metadata.source_file)


def _check_entry(name: str, entry) -> str:
    """The kind of an entry, "json" or "voc"."""
    is_name = isinstance(name, str) and NAME.fullmatch(name)
    if not is_name or len(name.encode()) > LONGEST_NAME:
        raise InputError(
            f"DATASETS.REGISTER has the name {format_value(name, quote=True)}; use letters, "
            f"digits, '_', '-' and '.', not one of the last two first, and at most {LONGEST_NAME} "
            "bytes"
        )
    place = f"DATASETS.REGISTER.{name}"
    if not isinstance(entry, Mapping) or len(kinds := KEYS.keys() & entry.keys()) != 1:
        got = format_value(entry, quote=True)
        raise InputError(f"{place} must say where the data lies, got {got}; {EXAMPLES}")
    (kind,) = kinds
    for key in sorted({"json": {"images"}, "voc": {"split"}}[kind] - entry.keys()):
        raise InputError(f"{place} has no {key!r}; {EXAMPLES}")
    for key in sorted(entry.keys() - KEYS[kind], key=str):
        raise InputError(f"{place} has an unknown key {format_value(key, quote=True)}; {EXAMPLES}")
    part = entry.get("part", (0, 1))
    numbers = isinstance(part, Sequence) and all(isinstance(p, (int, float)) for p in part)
    if not numbers or len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise InputError(
            f"{place}.part must be two shares like [0, 0.8], got {format_value(part, quote=True)}"
        )
    classes = entry.get("classes", ())
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
    if not is_list or not all(isinstance(class_, str) for class_ in classes):
        raise InputError(
            f"{place}.classes must be a list of names, got {format_value(classes, quote=True)}"
        )
    return kind


def _path(text: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(str(text))))


def ensure_annotations(name: str) -> None:
    """Writes the COCO file of a described data set that has none of its own; once per process.

    Raises:
        InputError: its source is missing or cannot be used.
    """
    metadata = MetadataCatalog.get(name)
    entry = metadata.get("described")
    if not entry or metadata.get("json_file"):
        return
    if "voc" in entry:
        content = read_voc(_path(entry["voc"]), entry["split"], entry.get("classes"))
    else:
        content = take_part(read_coco(metadata.source_file), *entry["part"])
        if not content["images"]:
            raise InputError(
                f"DATASETS.REGISTER.{name}.part {list(entry['part'])} holds none of the images of "
                f"{metadata.source_file}; widen it"
            )
    path = Path(_scratch().name, f"{name}.json")
    path.write_text(json.dumps(content))
    metadata.set(json_file=str(path))


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fcos_d2_datasets_")


def take_part(content: dict, low: float, high: float) -> dict:
    """The images of a COCO file whose share lies in [low, high), with their annotations.

    The share of an image depends on its file name alone: parts that do not overlap never have an
    image in common, and new images move no old one from training to validation.
    """
    images = [i for i in content["images"] if low <= _share(str(i["file_name"])) < high]
    kept = {image["id"] for image in images}
    annotations = [a for a in content.get("annotations", ()) if _is_of(a, kept)]
    return {**content, "images": images, "annotations": annotations}


def _is_of(annotation: object, images: set) -> bool:
    """Whether it belongs to one of ``images``. What belongs nowhere stays, to be complained of."""
    image = annotation.get("image_id") if isinstance(annotation, Mapping) else None
    return image is None or not isinstance(image, Hashable) or image in images


def _share(file_name: str) -> float:
    """A number in [0, 1), evenly spread over names."""
    return (
        int.from_bytes(hashlib.sha256(file_name.encode(errors="surrogatepass")).digest()[:6], "big")
        / 2**48
    )


def register_digits(root: str | os.PathLike | None = None) -> None:
    """Names ``digits_train`` and ``digits_val``; writes nothing. A second call moves them.

    Args:
        root: the folder that holds ``digits/``. Default: $DETECTRON2_DATASETS or ./datasets.
    """
    root = digits.default_root() if root is None else os.fspath(root)
    for split in digits.SPLITS:
        name = f"digits_{split}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(load_coco, name))
        MetadataCatalog.get(name).set(
            thing_classes=list(digits.CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(digits.CLASSES))},
            json_file=str(digits.annotation_file(root, split)),
            image_root=str(digits.image_folder(root, split)),
            evaluator_type="coco",
            digits_root=str(root),
        )


def is_coco(name: str) -> bool:
    """Whether it is registered here, or with detectron2's ``register_coco_instances``."""
    function = DatasetCatalog[name]
    ours = isinstance(function, partial) and function.func is load_coco
    return ours or getattr(function, "__module__", "") == "detectron2.data.datasets.coco"


def prepare(name: str) -> None:
    """Guarantees that the annotation file of data set ``name`` is there; makes what can be made.

    That is the built-in data, and COCO files of data sets in the config that have none.

    Whoever opens ``MetadataCatalog.get(name).json_file`` calls this first: COCOEvaluator does so
    when it is constructed, before any data is loaded.

    Raises:
        InputError: no such data set, or its annotation file is absent.
    """
    if name not in DatasetCatalog:
        raise InputError(_unknown_name(name))
    metadata = MetadataCatalog.get(name)
    if metadata.get("digits_root"):
        digits.ensure_digits(metadata.digits_root)
    ensure_annotations(name)
    json_file = metadata.get("json_file")
    if json_file and "://" not in json_file and not PathManager.exists(json_file):
        raise InputError(
            f"data set {name!r}: annotation file {json_file} does not exist; "
            f"{where_data_lives(name)}"
        )


def _unknown_name(name: str) -> str:
    known = DatasetCatalog.list()
    close = difflib.get_close_matches(name, known, n=3)
    advice = f"did you mean {' or '.join(close)}? Otherwise describe it" if close else "describe it"
    return (
        f"unknown data set {name!r}; {advice} in the config: DATASETS: {{REGISTER: {{{name}: "
        "{json: annotations.json, images: image_folder}}}"
    )


def where_data_lives(name: str) -> str:
    """What to correct where files of a data set are missing."""
    if MetadataCatalog.get(name).get("described"):
        return f"correct the paths in DATASETS.REGISTER.{name}"
    root = os.getenv("DETECTRON2_DATASETS")
    state = f"it is {root}" if root else "it is not set, which means ./datasets"
    return (
        "check the path it was registered with, or set DETECTRON2_DATASETS to the folder that "
        f"holds all data sets ({state})"
    )


def load_coco(name: str, masks: bool = False) -> list[dict]:
    """Records of a data set that a COCO file describes.

    Raises:
        InputError: the file is absent or has defects.
    """
    prepare(name)
    metadata = MetadataCatalog.get(name)
    content = read_coco(metadata.json_file)
    problems = problems_in_coco_annotations(content, masks)
    if problems:
        count = f" ({len(problems)} annotations have problems)" if len(problems) > 1 else ""
        source = metadata.get("source_file") or metadata.json_file
        raise InputError(f"{source}: {next(iter(problems.values()))}{count}")
    indices = set_classes(name, content["categories"])
    return coco_records(content, metadata.image_root, indices, masks)


# ---- Pascal VOC ----


def read_voc(folder: Path, split: str, classes: Sequence[str] | None = None) -> dict:
    """A split of a Pascal VOC folder as the content of a COCO file.

    Objects marked difficult become crowds, which evaluation leaves out of account. Pixels of VOC
    are counted from 1, those of COCO from 0.

    Args:
        folder: holds Annotations/*.xml, ImageSets/Main/SPLIT.txt and JPEGImages.
        split: a file of ImageSets/Main, without its suffix.
        classes: names in the order of the model's classes; those of all annotations in the folder,
            sorted, where None.

    Raises:
        InputError: a file is missing, no XML, or lacks a field.
    """
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        stems = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or one_line_cause(error)
        raise InputError(
            f"cannot read {listed}: {cause}; a VOC folder lists the images of a split there"
        ) from error
    if classes is None:
        files = sorted((folder / "Annotations").glob("*.xml"))
        classes = sorted({_class_name(o, f) for f in files for o in _xml(f).iter("object")})
    for wanted, what in ((stems, f"{listed} names no image"), (classes, f"{folder} has no class")):
        if not wanted:
            raise InputError(f"{what}; there is nothing to learn from")
    files = filter(is_image, sorted((folder / "JPEGImages").glob("*")))
    images = {file.stem: file.name for file in files}
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    for stem in stems:
        if stem != Path(stem).name or not stem.isprintable():
            raise InputError(
                f"{listed} names {format_value(stem)}, which is no file of Annotations"
            )
        _add_voc_image(content, folder, stem, images.get(stem))
    return content


def _add_voc_image(content: dict, folder: Path, stem: str, file_name: str | None) -> None:
    path = folder / "Annotations" / f"{stem}.xml"
    root = _xml(path)
    number = len(content["images"]) + 1
    image = {"id": number, "file_name": file_name or root.findtext("filename", f"{stem}.jpg")}
    image |= {side: _pixels(root, f"size/{side}", path) for side in ("width", "height")}
    content["images"].append(image)
    ids = {category["name"]: category["id"] for category in content["categories"]}
    for item in root.iter("object"):
        name = _class_name(item, path)
        if name not in ids:
            some = format_value(", ".join(ids))
            raise InputError(
                f"{path}: class {format_value(name, quote=True)} is none of {some}; add it to them"
            )
        corners = [
            _number(item, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax")
        ]
        x, y = corners[0] - 1, corners[1] - 1
        width, height = corners[2] - x, corners[3] - y
        if width < 0 or height < 0:
            raise InputError(
                f"{path}: bndbox of {format_value(name, quote=True)} is {format_value(corners)}, "
                "which must be xmin, ymin, xmax, ymax; correct it"
            )
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": number,
                "category_id": ids[name],
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": int(item.findtext("difficult", "0").strip() == "1"),
            }
        )


def _xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (LookupError, OSError, ValueError, ElementTree.ParseError) as error:
        raise InputError(
            f"cannot read annotation file {path}: {format_value(str(error))}; export it again"
        ) from error


def _class_name(item: ElementTree.Element, path: Path) -> str:
    name = item.findtext("name", "")
    if not name.strip():
        raise InputError(f"{path}: an object has no name; write the name of its class")
    return name


def _pixels(root: ElementTree.Element, field: str, path: Path) -> int:
    pixels = int(_number(root, field, path))
    if pixels < 1:
        raise InputError(f"{path}: {field} must be at least 1, got {pixels}; correct it")
    return pixels


def _number(element: ElementTree.Element, field: str, path: Path) -> float:
    text = element.findtext(field)
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < 2**31:
        raise InputError(
            f"{path}: {field} must be a number, got {format_value(text, quote=True)}; correct it"
        )
    return number
