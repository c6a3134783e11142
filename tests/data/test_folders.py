"""Tests recognition of folders with COCO files."""

import json
import shutil

import pytest

from fcos_d2.data.formats.folders import recognize
from fcos_d2.errors import InputError
from tests.catalogs import coco_content

from .two_images import HEIGHT, OBJECTS, WIDTH, assert_recognized, write

CLASSES = ["dog", "cat & co", "bird"]


@pytest.fixture
def coco(root):
    """Writes a COCO file for some images, and moves these to a folder."""

    def make(path, files, folder):
        (root / folder).mkdir(parents=True, exist_ok=True)
        objects = {}
        for file in files:
            shutil.move(root / "images" / file, root / folder / file)
            objects[file] = [(CLASSES.index(label) + 1, box) for label, *box in OBJECTS[file]]
        content = coco_content(objects, CLASSES, (WIDTH, HEIGHT))
        write(root / path, content)
        return content

    make.folder = root
    return make


def test_single_file_with_an_image_folder_is_recognized(register, coco):
    coco("labels.json", OBJECTS, "photos")
    assert_recognized(register, coco.folder, all=OBJECTS)


@pytest.mark.parametrize("suffix, split", [("train2017", "train"), ("val2017", "val")])
def test_coco_folders_are_recognized(register, coco, suffix, split):
    coco(f"annotations/instances_{suffix}.json", OBJECTS, suffix)
    write(coco.folder / f"annotations/captions_{suffix}.json", {"images": []})
    assert_recognized(register, coco.folder, **{split: OBJECTS})


def test_roboflow_splits_are_recognized(register, coco):
    for split, file in zip(("valid", "test"), OBJECTS, strict=True):
        coco(f"{split}/_annotations.coco.json", [file], split)
    assert_recognized(register, coco.folder, val=["a.jpg"], test=["b.png"])


def test_several_files_are_one_dataset(register, coco):
    for folder, file in zip(("one", "two"), OBJECTS, strict=True):
        coco(f"{folder}/labels.json", [file], folder)
    assert_recognized(register, coco.folder, all=OBJECTS)


def test_supercategory_that_roboflow_lists_as_a_class_is_dropped(coco):
    content = coco("labels.json", OBJECTS, "photos")
    categories = [{**category, "supercategory": "pets"} for category in content["categories"]]
    content["categories"] = [{"id": 9, "name": "pets", "supercategory": "none"}, *categories]
    write(coco.folder / "labels.json", content)
    assert recognize(coco.folder)["all"]["classes"] == CLASSES


def test_clean_file_replaces_its_original(coco):
    coco("labels_clean.json", OBJECTS, "photos")
    write(coco.folder / "labels.json", {"images": [], "categories": [], "annotations": []})
    assert recognize(coco.folder)["all"]["json"] == str(coco.folder / "labels_clean.json")


@pytest.mark.parametrize(
    "files, text",
    [
        ({}, "contains no annotations of a known format, but 0 files"),
        ({"a.csv": "", "b.csv": ""}, r"but 2 files \(2 .csv\)"),
        ({"a.json": json.dumps({"type": 1, "features": 2})}, "/a.json: GeoJSON"),
    ],
)
def test_folder_without_known_annotations_is_rejected_with_its_content(tmp_path, files, text):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=text):
        recognize(tmp_path)
