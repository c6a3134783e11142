"""Tests YOLO datasets with and without data.yaml, including Roboflow's."""

import shutil
from pathlib import Path

import pytest

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.inspection import inspect_dataset
from fcos_d2.errors import InputError

from .two_images import HEIGHT, OBJECTS, WIDTH, assert_recognized, assert_same, boxes

NAMES = ["dog", "cat & co", "bird"]


def yolo_line(label, x, y, w, h) -> str:
    values = ((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT)
    return " ".join([str(NAMES.index(label)), *(f"{value:.8f}" for value in values)])


@pytest.fixture
def yolo(root):
    """Writes images/train with both images, and images/val with a copy of one of them."""
    (root / "images").rename(root / "all")
    for split, files in (("train", ("a.jpg", "b.png")), ("val", ("b.png",))):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for file in files:
            shutil.copy(root / "all" / file, root / "images" / split / file)
            lines = "\n".join(yolo_line(*item) for item in OBJECTS[file])
            (root / "labels" / split / f"{Path(file).stem}.txt").write_text(f"{lines}\n\n")
    shutil.rmtree(root / "all")
    return root


def data_yaml(root, text) -> dict:
    (root / "data.yaml").write_text(text)
    return {"yolo": str(root / "data.yaml")}


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train\nval: images/val\nnames: [dog, cat & co, bird]",
        "path: .\ntrain: [images/train]\nval: images/val\nnames: {0: dog, 1: cat & co, 2: bird}",
        "train: ../images/train\nvalid: ../images/val\nnc: 3\nnames: ['dog', 'cat & co', 'bird']",
        "train: train.txt\nval: images\\val\nnames: [dog, cat & co, bird]",
    ],
    ids=["plain", "numbered names", "Roboflow", "list of images"],
)
def test_yolo_splits(register, yolo, text):
    (yolo / "train.txt").write_text("./images/train/a.jpg\nimages/train/b.png\n")
    entry = data_yaml(yolo, text)
    register(train={**entry, "split": "train"}, val={**entry, "split": "val"})
    assert class_names("train") == class_names("val") == NAMES
    assert_same("train")
    assert_same("val", {"b.png": OBJECTS["b.png"]})
    assert_recognized(register, yolo, train=OBJECTS, val=["b.png"])


def test_yolo_folders_of_roboflow(register, yolo):
    for folder in ("images", "labels"):
        (yolo / "train").mkdir(exist_ok=True)
        (yolo / folder / "train").rename(yolo / "train" / folder)
    entry = data_yaml(yolo, "train: ../train/images\nnames: [dog, cat & co, bird]")
    register(train={**entry, "split": "train"})
    assert_same("train")


def test_yolo_without_a_yaml_file_has_labels_next_to_images(register, yolo):
    flat = yolo / "flat"
    flat.mkdir()
    for file in [*(yolo / "images/train").iterdir(), *(yolo / "labels/train").iterdir()]:
        shutil.copy(file, flat / file.name)
    (flat / "classes.txt").write_text("dog\ncat & co\nbird\n")
    register(mine={"yolo": str(flat)})
    assert class_names("mine") == NAMES
    assert_same("mine")
    assert_recognized(register, flat, all=OBJECTS)


def test_yolo_polygons_keypoints_and_scores(register, yolo):
    labels, yaml = yolo / "labels/val/b.txt", "val: images/val\nnames: [dog, cat & co, bird]"
    labels.write_text("0 0.1 0.1 0.5 0.1 0.18 0.266667")
    entry = {**data_yaml(yolo, yaml), "split": "val"}
    register(mine=entry)
    assert_same("mine", {"b.png": [("dog", 5, 6, 20, 10)]})
    labels.write_text(f"{yolo_line('bird', 1, 2, 3, 4)} 0.9")
    register(mine=entry)
    assert_same("mine", {"b.png": [("bird", 1, 2, 3, 4)]})
    labels.write_text(f"{yolo_line('bird', 1, 2, 3, 4)} 0.1 0.1 2 0.2 0.2 2")
    register(mine={**data_yaml(yolo, f"{yaml}\nkpt_shape: [2, 3]"), "split": "val"})
    assert_same("mine", {"b.png": [("bird", 1, 2, 3, 4)]})


def test_yolo_image_without_labels_has_no_objects(register, yolo):
    (yolo / "labels/train/b.txt").unlink()
    register(mine={**data_yaml(yolo, "train: images/train\nnames: [dog, c, b]"), "split": "train"})
    assert [len(objects) for objects in boxes("mine").values()] == [2, 0]


@pytest.mark.parametrize(
    "line, text",
    [
        ("3 0.5 0.5 0.1 0.1", "class 3 is out of range for 3 classes, starting at 0"),
        ("dog 0.5 0.5 0.1 0.1", "dog 0.5 0.5 0.1 0.1 is not a class number and coordinates"),
        ("0 nan 0.5 0.1 0.1", "is not a class number and coordinates"),
        ("0 0.5 0.5", "0 0.5 0.5 is not a class, x, y, width and height"),
        ("0 25 30 10 10", "is not a class, x, y, width and height relative to the image, 0 to 1"),
    ],
)
def test_invalid_yolo_line_is_reported(register, yolo, line, text):
    (yolo / "labels/val/b.txt").write_text(f"\n{line}\n{yolo_line('bird', 1, 2, 3, 4)}")
    register(mine={**data_yaml(yolo, "val: images/val\nnames: [dog, c, bird]"), "split": "val"})
    (problem,) = inspect_dataset("mine").problems
    assert problem.text.startswith("annotation in line 2 of b.txt: ") and text in problem.text


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: images/none\nnames: [a]", "images/none does not exist; correct the path"),
        ("val: images/val\nnames: [a]", "no split 'train'; available splits: val"),
        ("train: images/train", "class names are missing"),
        ("train: images/train\nnames: {0: a, 2: b}", "numbered from 0 without gaps"),
        ("train: images/train\nnames: [a, a]", "two classes have the same name"),
        ("train: labels\nnames: [a]", "no images in"),
        ("[", "cannot read annotation file .*data.yaml"),
        ("text", "data.yaml must contain a mapping of keys"),
    ],
)
def test_invalid_data_yaml_is_rejected(register, yolo, text, message):
    register(mine={**data_yaml(yolo, text), "split": "train"})
    with pytest.raises(InputError, match=message):
        load_dataset("mine")
