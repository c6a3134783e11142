"""Reads COCO, LabelMe, VIA, Label Studio and CreateML JSON, and detects the format."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, ValuesView
from itertools import chain
from pathlib import Path

from ...errors import InputError, format_value
from .builder import Builder, Shape, Source, enclosing_box, rotated_box
from .files import read_json

UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # Label Studio adds eight digits to uploaded files
CLASS_KEYS = ("class", "label", "name", "category", "type", "object", "species")


def read_annotations(path: str | Path, image_root: str) -> Source:
    """Reads a JSON file, or a folder of LabelMe files.

    Raises:
        InputError: the file cannot be read, or its format is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _read_labelme(path, image_root)
    content = read_json(path)
    coco = to_coco(content, image_root)
    if coco is None:
        found = detect_format(content)
        raise InputError(f"{path} is {found}; export the annotations as COCO, YOLO or Pascal VOC")
    return Source(str(path), image_root, coco)


def to_coco(content: object, image_root: str = "") -> dict | None:
    """Converts the content of a JSON file to COCO; returns None if its format is not supported."""
    name = detect_format(content)
    if name == "COCO":
        return content
    if name not in READERS:
        return None
    builder = Builder()
    READERS[name](builder, content, image_root)
    return builder.content()


def detect_format(content: object) -> str:
    """Returns the name of the format of a JSON file, or a description of its content."""
    is_list = isinstance(content, list) and len(content) > 0
    entry = content[0] if is_list else content
    if not isinstance(entry, dict):
        return f"JSON of type {type(content).__name__}, in an unknown format"
    if not is_list:
        values = next((v for v in content.values() if isinstance(v, dict)), {})
        if "_via_img_metadata" in content or {"filename", "regions"} <= values.keys():
            return "VIA"
    for keys, name in LISTS if is_list else DICTS:
        if keys <= entry.keys():
            return name
    keys = format_value(", ".join(map(str, list(entry)[:5]))) or "none"
    what = "a JSON list of objects" if is_list else "JSON"
    return f"{what} with the keys {keys}, in an unknown format"


# Keys -> format; the first row whose keys all exist decides.
DICTS = (
    ({"shapes", "imagePath"}, "LabelMe"),
    ({"annotations", "categories", "segments_info"}, "COCO's panoptic format"),
    ({"images"}, "COCO"),
    ({"categories", "annotations"}, "COCO"),
    ({"items", "categories"}, "Datumaro's format"),
    ({"type", "features"}, "GeoJSON"),
    ({"objects", "size", "tags"}, "Supervisely's format"),
    ({"_via_settings"}, "VIA"),
)
LISTS = (
    ({"image_id", "category_id", "score"}, "COCO's format of detections, not of annotations"),
    ({"data", "annotations"}, "Label Studio"),
    ({"data", "completions"}, "Label Studio"),
    ({"image", "annotations"}, "CreateML"),
    ({"imagefilename", "annotations"}, "CreateML"),
    ({"image", "annotation_id"}, "Label Studio"),
    ({"image", "label"}, "Label Studio"),
    ({"name", "labels"}, "BDD100K's format"),
    ({"data_row"}, "Labelbox's format"),
)


# ---- LabelMe ----


def _read_labelme(folder: Path, image_root: str) -> Source:
    builder, files, found = Builder(), sorted(folder.rglob("[!.]*.json")), False
    for path in files:
        try:
            content = read_json(path)
        except InputError as error:
            builder.add_broken_image(str(error))
            continue
        if detect_format(content) == "LabelMe":
            found = True
            _add_labelme(builder, content, image_root, path.name)
    if not found:
        raise InputError(
            f"{folder} contains {len(files)} JSON files, but none of LabelMe; for other formats, "
            "specify a file"
        )
    return Source(str(folder), image_root, builder.content())


def _add_labelme(builder: Builder, content: dict, image_root: str, file: str = "") -> None:
    size = content.get("imageWidth"), content.get("imageHeight")
    image = builder.add_image(content["imagePath"], *size)
    for number, shape in enumerate(_dicts(content["shapes"])):
        place = f"{number} of {file or content['imagePath']}"
        builder.add_shape(image, shape.get("label"), shape, _labelme_box, place)


def _labelme_box(shape: dict) -> Shape:
    points = [(float(x), float(y)) for x, y in shape["points"]]
    if shape.get("shape_type") == "circle":
        (x, y), radius = points[0], math.dist(*points)
        points = [(x - radius, y - radius), (x + radius, y + radius)]
    is_polygon = shape.get("shape_type") == "polygon"
    return enclosing_box(points), list(chain.from_iterable(points)) if is_polygon else None


# ---- VGG Image Annotator ----


def _add_via(builder: Builder, content: dict, image_root: str) -> None:
    images = _dicts(content.get("_via_img_metadata", content).values())
    images = [image for image in images if isinstance(image.get("filename"), str)]
    regions = [_regions(image) for image in images]
    key = _class_key(region for found in regions for region in found)
    for image, found in zip(images, regions, strict=True):
        number = builder.add_image(image["filename"])
        for index, region in enumerate(found):
            place, shape = f"{index} of {image['filename']}", region.get("shape_attributes")
            builder.add_shape(number, _via_label(region, key), shape, _via_box, place)


def _regions(image: dict) -> list[dict]:
    regions = image.get("regions") or []
    return list(_dicts(regions.values() if isinstance(regions, dict) else regions))


def _class_key(regions: Iterable[dict]) -> str | None:
    """Returns the attribute that contains the class, or None if regions have no attributes."""
    keys = dict.fromkeys(key for region in regions for key in _attributes(region))
    named = [key for name in CLASS_KEYS for key in keys if key.lower() == name]
    return next(iter(named or keys), None)


def _attributes(region: dict) -> dict:
    return value if isinstance(value := region.get("region_attributes"), dict) else {}


def _via_label(region: dict, key: str | None) -> object:
    if key is None:
        return "object"
    value = _attributes(region).get(key)
    if isinstance(value, dict):  # checkboxes
        return next((name for name, is_set in value.items() if is_set), None)
    return value


def _via_box(shape: dict) -> Shape:
    name = shape.get("name")
    if name == "rect":
        return [shape[key] for key in ("x", "y", "width", "height")]
    if name in ("circle", "ellipse"):
        rx, ry = (float(shape.get(key, shape.get("r"))) for key in ("rx", "ry"))
        x, y = float(shape["cx"]) - rx, float(shape["cy"]) - ry
        return rotated_box([x, y, 2 * rx, 2 * ry], math.degrees(float(shape.get("theta", 0))))
    if name == "point":
        return [shape["cx"], shape["cy"], 0, 0]
    points = list(zip(shape["all_points_x"], shape["all_points_y"], strict=True))
    return enclosing_box(points), list(chain.from_iterable(points)) if name == "polygon" else None


# ---- Label Studio ----


def _add_label_studio(builder: Builder, content: list, image_root: str) -> None:
    for task in _dicts(content):
        name = _task_image(task)
        if name is None:
            builder.add_broken_image(f"task {format_value(task.get('id'))} has no image")
            continue
        shapes = list(_task_shapes(task))
        sizes = [(s["original_width"], s["original_height"]) for s in shapes if _has_size(s)]
        image = builder.add_image(_original_name(name, image_root), *(sizes or [()])[0])
        for number, shape in enumerate(shapes):
            _add_task_shape(builder, image, shape, f"{number} of {name}")


def _task_image(task: dict) -> str | None:
    data = task.get("data", task)
    values = [data.get("image"), *data.values()] if isinstance(data, dict) else []
    return next((v for v in values if isinstance(v, str) and "." in v), None)


def _task_shapes(task: dict) -> Iterator[dict]:
    """Yields the shapes of the last annotation that was not cancelled, or of a minimal export."""
    results = _dicts(task.get("annotations") or task.get("completions"))
    if results := [a for a in results if not a.get("was_cancelled") and not a.get("skipped")]:
        yield from _dicts(results[-1].get("result"))
        return
    for value in task.values() if "data" not in task else ():
        yield from filter(_has_size, _dicts(value))


def _has_size(shape: dict) -> bool:
    return {"original_width", "original_height"} <= shape.keys()


def _original_name(name: str, image_root: str) -> str:
    """Removes the prefix of uploaded files from an image name if only that file exists."""
    match = UPLOADED.fullmatch(name.replace("\\", "/").rpartition("/")[2])
    exists = [os.path.exists(os.path.join(image_root, match[i])) for i in (0, 1)] if match else []
    return match[1] if exists == [False, True] else name


def _add_task_shape(builder: Builder, image: int, shape: dict, place: str) -> None:
    value = shape.get("value", shape)
    items = value.items() if isinstance(value, dict) else ()
    if labels := [v for k, v in items if k.endswith("labels")]:  # else it is a choice or text
        label = labels[0][0] if isinstance(labels[0], list) and labels[0] else None
        builder.add_shape(image, label, shape, _task_box, place)


def _task_box(shape: dict) -> Shape:
    value = shape.get("value", shape)
    scale = float(shape["original_width"]) / 100, float(shape["original_height"]) / 100
    if "points" in value:
        points = [(float(x) * scale[0], float(y) * scale[1]) for x, y in value["points"]]
        return enclosing_box(points), list(chain.from_iterable(points))
    keys = ("x", "y", "radiusX", "radiusY") if "radiusX" in value else ("x", "y", "width", "height")
    x, y, w, h = (float(value[key]) * s for key, s in zip(keys, scale * 2, strict=True))
    angle = float(value.get("rotation") or 0)
    if "radiusX" in value:
        return rotated_box([x - w, y - h, 2 * w, 2 * h], angle)
    return rotated_box([x, y, w, h], angle, pivot=(0, 0))


# ---- CreateML ----


def _add_createml(builder: Builder, content: list, image_root: str) -> None:
    for entry in _dicts(content):
        name = entry.get("image", entry.get("imagefilename"))
        image = builder.add_image(name)
        for number, item in enumerate(_dicts(entry.get("annotations"))):
            place = f"{number} of {name}"
            builder.add_shape(image, item.get("label"), item, _createml_box, place)


def _createml_box(item: dict) -> Shape:
    x, y, w, h = (float(item["coordinates"][key]) for key in ("x", "y", "width", "height"))
    return [x - w / 2, y - h / 2, w, h]


def _dicts(values: object) -> Iterator[dict]:
    """Returns the dicts in a list or view; none for other values."""
    values = values if isinstance(values, (list, ValuesView)) else ()
    return (value for value in values if isinstance(value, dict))


READERS = {
    "LabelMe": _add_labelme,
    "VIA": _add_via,
    "Label Studio": _add_label_studio,
    "CreateML": _add_createml,
}
