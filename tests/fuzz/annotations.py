"""Fuzz target: annotation files of DATASETS.REGISTER, which are loaded and checked.

The input is a COCO file, a file of another tool, a Pascal VOC folder or YOLO labels: arbitrary
bytes or a corrupted valid file. The result must be valid records, or a one-line error that contains
the name of the dataset or file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from xml.sax.saxutils import escape

from detectron2.data import MetadataCatalog
from PIL import Image

from fcos_d2.data import class_names, load_dataset, register_datasets
from fcos_d2.data.inspection import clean, describe_contents, inspect_dataset
from fcos_d2.data.records import explain_missing_objects

from .choices import Choices, corrupt
from .oracle import allow_input_error, scratch

NAME = "fuzzed"
COCO = {
    "images": [
        {"id": 1, "file_name": "1.png", "width": 60, "height": 40},
        {"id": 2, "file_name": "2.png", "width": 60, "height": 40},
    ],
    "categories": [{"id": 1, "name": "disc"}, {"id": 7, "name": "box"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 20, 10], "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [5, 6, 20, 10], "iscrowd": 1},
    ],
}
COCO["annotations"][0]["area"] = 200
COCO["annotations"][1]["segmentation"] = {"size": [40, 60], "counts": [0, 2400]}
COCO["annotations"][0]["segmentation"] = [[5, 6, 25, 6, 25, 16]]


VIA = {
    "1": {
        "filename": "1.png",
        "regions": [
            {
                "shape_attributes": {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4},
                "region_attributes": {"class": "disc"},
            }
        ],
    }
}
LABELME = {"imagePath": "1.png", "imageWidth": 60, "imageHeight": 40}
LABELME["shapes"] = [{"label": "disc", "points": [[1, 2], [3, 4]], "shape_type": "circle"}]
SHAPE = {"original_width": 60, "original_height": 40}
SHAPE["value"] = {"x": 1, "y": 2, "width": 30, "height": 40, "rotation": 5, "labels": ["disc"]}
TASKS = [{"id": 1, "data": {"image": "1.png"}, "annotations": [{"result": [SHAPE]}]}]
COORDINATES = {"x": 5, "y": 6, "width": 3, "height": 4}
CREATEML = [{"image": "1.png", "annotations": [{"label": "disc", "coordinates": COORDINATES}]}]
OTHERS = (VIA, LABELME, TASKS, CREATEML)

# ---- JSON ----


def coco_file(choices: Choices) -> bytes:
    """Returns a COCO file with corrupted values or text."""
    return corrupted_json(choices, COCO)


def other_file(choices: Choices) -> bytes:
    """Returns a file of another tool with corrupted values or text."""
    return corrupted_json(choices, choices.of(OTHERS))


def corrupted_json(choices: Choices, content: object) -> bytes:
    """Returns ``content`` as corrupted JSON."""
    text = json.dumps(corrupt(choices, content)).encode()
    change = choices.of(("none", "truncate", "insert", "duplicate"))
    place = choices.number(len(text) + 1)
    if change == "truncate":
        return text[:place]
    if change == "insert":
        odd = (b"[" * 100_000, b"\xff", b"\xef\xbb\xbf", b"9" * 5000, b'"', b"NaN", b"\0", b"\n")
        return text[:place] + choices.of(odd) + text[place:]
    return text + text if change == "duplicate" else text


def json_entry(choices: Choices, text: Callable[[Choices], bytes] = coco_file) -> dict:
    """Writes a JSON file, and returns its entry of DATASETS.REGISTER."""
    path = scratch("annotations.json")
    path.write_bytes(choices.of((text, Choices.rest))(choices))
    entry: dict = {"json": str(path), "images": str(scratch("images"))}
    if choices.number(2):
        entry["part"] = choices.of(([0, 1], [0, 0.5], [0.999, 1]))
    return entry


# ---- Pascal VOC ----

ODD_XML = (
    "",
    "&lol;",
    '<?xml version="1.0" encoding="utf-7"?>',
    '<?xml version="1.0" encoding="shift_jis"?>',
    '<!DOCTYPE a [<!ENTITY lol SYSTEM "file:///etc/hostname">]>',
    "<!DOCTYPE a [<!ENTITY a '0123456789'>"
    + "".join(f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    + "]>",
    "<a>" * 20_000,
    "<object>" * 50,
    "\x00",
    "<object/>",
    "</annotation>",
)


def voc_file(choices: Choices) -> bytes:
    """Returns a Pascal VOC file with corrupted values or text."""
    fields = {"filename": "1.png", "width": 60, "height": 40, "name": "disc", "difficult": 0}
    fields |= {"xmin": 1, "ymin": 1, "xmax": 20, "ymax": 10}
    values = corrupt(choices, fields)
    values = values if isinstance(values, dict) else {}

    def tag(name: str) -> str:
        text = str(values[name])[:10_000] if name in values else None
        return "" if text is None else f"<{name}>{escape(text)}</{name}>"

    box = "".join(map(tag, ("xmin", "ymin", "xmax", "ymax")))
    text = (
        f"<annotation>{tag('filename')}<size>{tag('width')}{tag('height')}</size>"
        f"<object>{tag('name')}{tag('difficult')}<bndbox>{box}</bndbox></object></annotation>"
    )
    place = choices.of((0, len(text), text.index("</size>"), text.index("<bndbox>")))
    return (text[:place] + choices.of(ODD_XML) + text[place:]).encode("utf-8", "surrogatepass")


def voc_entry(choices: Choices) -> dict:
    """Writes a Pascal VOC folder with one image, and returns its entry."""
    root = scratch("voc")
    stem = choices.of(("1", "[1]", "a b"))
    split = choices.of((stem, "..", "/", "**", "?", "\0", "../x", "\ud800", "", f"{stem}\n{stem}"))
    (root / "ImageSets/Main/train.txt").write_bytes(split.encode("utf-8", "surrogatepass"))
    content = choices.of((voc_file, Choices.rest))(choices)
    path = root / "Annotations" / f"{stem}.xml"
    path.write_bytes(content)
    entry: dict = {"voc": str(root), "split": "train"}
    if choices.number(2):
        entry["classes"] = choices.of((["disc"], ["other"]))
    return entry


# ---- YOLO ----


def yolo_entry(choices: Choices) -> dict:
    """Writes a folder with corrupted labels, and returns its entry."""
    words = corrupt(choices, ["0", "0.5", "0.5", "0.1", "0.2", "0.3", "0.4"][: choices.of((5, 7))])
    line = " ".join(map(str, words)) if isinstance(words, list) else str(words)
    content = choices.of((lambda choices: line.encode("utf-8", "ignore"), Choices.rest))(choices)
    scratch("images/1.txt").write_bytes(content)
    scratch("images/classes.txt").write_text("disc\nbox\n")
    return {"yolo": str(scratch("images"))}


# ---- Fuzz target ----


def prepare_folders() -> None:
    """Creates images, and the folders of a VOC dataset without annotations."""
    shutil.rmtree(scratch("voc"), ignore_errors=True)
    for folder in ("images", "voc/Annotations", "voc/ImageSets/Main", "voc/JPEGImages"):
        scratch(folder).mkdir(parents=True, exist_ok=True)
    for name in ("images/1.png", "images/2.png", "voc/JPEGImages/1.png"):
        Image.new("RGB", (60, 40)).save(scratch(name))


def check(data: bytes) -> None:
    """Checks one dataset."""
    choices = Choices(data)
    if choices.number(16) == 15:
        entry = corrupt(choices, {"json": "a", "images": "b", "part": [0, 1]})
        with allow_input_error(f"DATASETS.REGISTER.{NAME}"):
            register_datasets({NAME: entry})
        return
    if not scratch("images").is_dir():
        prepare_folders()
    makers = (json_entry, voc_entry, yolo_entry, partial(json_entry, text=other_file))
    entry = choices.of(makers)(choices)
    register_datasets({NAME: entry})
    for use in (inspect, load_for_training, load_for_evaluation, load_with_masks, class_names):
        # Clears all caches, as in a new process.
        register_datasets({NAME: entry})
        with allow_input_error(repr(NAME), *map(str, entry.values())):
            use(NAME)
    for file in (*scratch("voc/Annotations").glob("*"), *scratch("images").glob("*.txt")):
        file.unlink()


def inspect(name: str) -> None:
    """Runs the dataset check."""
    found = inspect_dataset(name, read_images=False)
    describe_contents(found)
    explain_missing_objects(found.records)
    for problem in (*(text for _, text in found.problems), *found.image_problems.values()):
        assert problem.isprintable() and len(problem) < 1000, problem[:1000]
    for cleaned in clean([found], [found]):
        json.dumps(cleaned.content)


def load_for_training(name: str) -> None:
    """Loads the dataset like training."""
    num_classes = None
    for record in load_dataset(name):
        num_classes = num_classes or len(MetadataCatalog.get(name).thing_classes)
        for annotation in record["annotations"]:
            assert 0 <= annotation["category_id"] < num_classes
            x, y, width, height = annotation["bbox"]
            assert width >= 0 and height >= 0 and math.isfinite(x + y)


def load_for_evaluation(name: str) -> None:
    """Loads the dataset like evaluation; no object may be lost if the check finds no problem."""
    found, records = inspect_dataset(name, read_images=False), load_dataset(name, False)
    if not found.num_problems:
        counts = [
            sorted((record["file_name"], len(record["annotations"])) for record in part)
            for part in (found.records, records)
        ]
        assert counts[0] == counts[1]


def load_with_masks(name: str) -> None:
    """Loads the dataset like training of a model with masks."""
    load_dataset(name, masks=True)
