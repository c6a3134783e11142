"""Tests datasets of DATASETS.REGISTER: their files, classes and parts."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fcos_d2.data import class_names, count_classes, load_dataset, register_datasets
from fcos_d2.data.custom import image_filter, original_name
from fcos_d2.data.inspection import inspect_dataset
from fcos_d2.errors import InputError


def entry(coco, **more) -> dict:
    coco.json_file.write_text(json.dumps(coco.content))
    return {"json": str(coco.json_file), "images": str(coco.folder), **more}


def labels(name) -> list[list[str]]:
    """Returns the class names of the objects of every image."""
    names = class_names(name)
    records = load_dataset(name, filter_empty=False)
    return [[names[a["category_id"]] for a in record["annotations"]] for record in records]


def test_coco_entry_loads_the_same_records_as_detectron2(register, coco):
    register(mine=entry(coco))
    assert class_names("mine") == ["disc", "box"] and count_classes("mine") == 2
    records = load_dataset("mine")
    assert records == load_dataset(coco.register())
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    assert class_names("mine") == MetadataCatalog.get("mine").thing_classes


def test_registration_does_not_open_files(register):
    register(mine={"json": "none.json", "images": "none"})
    with pytest.raises(InputError, match="dataset 'mine': cannot read annotation file none.json"):
        load_dataset("mine")


@pytest.mark.parametrize(
    "name, original",
    [
        ("a/cat_12.jpg", "a/cat_12.jpg"),
        ("cat_jpg.rf.0a1b2c.jpg", "cat"),
        ("cat_jpg.rf.ffffff.jpg", "cat"),
        ("a/cat_aug3.png", "a/cat"),
        ("cat-flip.png", "cat"),
        ("catalog.png", "catalog.png"),
    ],
)
def test_augmented_copies_are_recognized_by_suffix(name, original):
    assert original_name(name) == original


def test_parts_partition_the_images_and_keep_augmented_copies_together():
    names = [f"{n}.png" for n in range(300)]
    parts = [set(filter(image_filter(part), names)) for part in ((0, 0.8), (0.8, 1))]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 300
    assert 210 < len(parts[0]) < 270
    copies = [f"{n}_png.rf.{hash_}.jpg" for n in range(50) for hash_ in ("0a", "1b")]
    taken = [original_name(name) for name in filter(image_filter((0, 0.5)), copies)]
    assert 10 < len(set(taken)) < 40 and all(taken.count(name) == 2 for name in taken)


def test_part_can_be_a_list_of_images_or_its_complement(register, coco, tmp_path):
    (tmp_path / "val.txt").write_text("\ufeff2.png\n\n", encoding="utf-8")
    path = str(tmp_path / "val.txt")
    register(val=entry(coco, part=path), train=entry(coco, part=f"not {path}"))
    found = [[r["image_id"] for r in load_dataset(name)] for name in ("val", "train")]
    assert found == [[2], [1, 3]]


def test_part_depends_on_the_resolved_file_name(register, coco):
    parts = []
    for folder in ("", "..\\images\\"):
        for number, image in enumerate(coco.content["images"], 1):
            image["file_name"] = f"{folder}{number}.png"
        register(mine=entry(coco, part=[0, 0.5]))
        parts.append([record["image_id"] for record in inspect_dataset("mine").records])
    assert parts[0] == parts[1]


def test_problem_is_reported_only_for_the_part_that_contains_it(register, coco):
    coco.content["annotations"][0]["bbox"] = None
    (coco.folder / "val.txt").write_text("1.png")
    path = str(coco.folder / "val.txt")
    register(val=entry(coco, part=path), train=entry(coco, part=f"not {path}"))
    with pytest.raises(InputError, match=f"{coco.json_file}: annotation 101: bbox is missing"):
        load_dataset("val")
    assert len(load_dataset("train")) == 2
    assert [inspect_dataset(name).num_problems for name in ("val", "train")] == [1, 0]


def test_empty_part_is_rejected(register, coco):
    register(mine=entry(coco, part=[0, 1e-9]))
    with pytest.raises(InputError, match=r"part \(?\[?0, 1e-09.* contains no images of"):
        load_dataset("mine")


# ---- Classes ----


def test_classes_are_selected_and_ordered(register, coco):
    register(mine=entry(coco, classes=["box", "disc"]), one=entry(coco, classes=["box"]))
    assert class_names("mine") == ["box", "disc"]
    assert labels("mine") == [["box"], ["disc"], ["box"]]
    assert class_names("one") == ["box"] and labels("one") == [["box"], [], ["box"]]
    assert len(load_dataset("one")) == 2
    register(more=entry(coco, classes=["never", "disc"]))
    assert class_names("more") == ["never", "disc"] and labels("more") == [[], ["disc"], []]


def test_classes_are_renamed_and_merged(register, coco):
    register(
        renamed=entry(coco, rename={"box": "crate"}),
        merged=entry(coco, rename={"box": "thing", "disc": "thing"}),
        both=entry(coco, rename={"box": "thing"}, classes=["thing"]),
    )
    assert class_names("renamed") == ["disc", "crate"]
    assert labels("renamed") == [["crate"], ["disc"], ["crate"]]
    assert class_names("merged") == ["thing"] and labels("merged") == [["thing"]] * 3
    assert labels("both") == [["thing"], [], ["thing"]]


def test_categories_of_the_same_name_are_merged_by_rename(register, coco):
    coco.content["categories"][1]["name"] = "disc"
    register(mine=entry(coco, rename={"disc": "disc"}))
    assert class_names("mine") == ["disc"] and labels("mine") == [["disc"]] * 3


@pytest.mark.parametrize(
    "more, text",
    [
        ({"rename": {"bok": "crate"}}, "bok in rename is not a class; did you mean box"),
        ({"rename": {"x": "y"}}, "x in rename is not a class; it has disc, box"),
        (
            {"classes": ["cat", "dog"]},
            r"has none of the classes \['cat', 'dog'\]; its classes are disc, box",
        ),
    ],
)
def test_unknown_class_names_are_rejected(register, coco, more, text):
    register(mine=entry(coco, **more))
    for use in (class_names, load_dataset):
        with pytest.raises(InputError, match=text):
            use("mine")


def test_several_files_become_one_dataset(register, coco, tmp_path):
    first = entry(coco)
    coco.content["categories"] = [{"id": 5, "name": "box"}, {"id": 9, "name": "ring"}]
    for annotation in coco.content["annotations"]:
        annotation["category_id"] = 5 + 4 * (annotation["image_id"] % 2)
    (tmp_path / "more.json").write_text(json.dumps(coco.content))
    both = {"json": [first["json"], str(tmp_path / "more.json")], "images": str(coco.folder)}
    register(mine=both, pattern={**both, "json": str(tmp_path / "*.json")})
    assert class_names("mine") == ["disc", "box", "ring"]
    assert labels("mine") == [["box"], ["disc"], ["box"], ["ring"], ["box"], ["ring"]]
    assert len({record["image_id"] for record in load_dataset("mine")}) == 6
    assert len(load_dataset("pattern")) == 6
    coco.content["annotations"][0]["bbox"] = None
    (tmp_path / "more.json").write_text(json.dumps(coco.content))
    (problem,) = inspect_dataset("mine").problems
    assert problem.text.startswith(f"{tmp_path / 'more.json'}: annotation 101: ")


# ---- Entries ----


@pytest.mark.parametrize(
    "invalid, message",
    [
        ("labels.json", "must specify where the data is, got 'labels.json'"),
        ({}, "must specify where the data is"),
        ({"json": "a"}, "has no 'images'"),
        ({"json": 5, "images": "a"}, "json must be a path or a list of paths"),
        ({"json": ["a", "b", "c"], "images": ["a", "b"]}, "images must be one folder, or one fold"),
        ({"json": "a", "images": "b", "image": "c"}, "unknown key 'image'"),
        ({"json": "a", "images": "b", "split": "c"}, "unknown key 'split'"),
        ({"json": "a", "images": "b", "part": 0.8}, r"two fractions such as \[0, 0.8\].*, got 0.8"),
        ({"voc": "a", "split": "b", "classes": "dog"}, "a list of unique names, got 'dog'"),
        ({"voc": "a", "classes": ["dog", "dog"]}, "a list of unique names"),
        ({"voc": {"xml": "a"}}, r"voc must be a folder or \{xml: folder, images: folder\}"),
        ({"voc": "a", "split": 5}, "split must be a name, got 5"),
        ({"yolo": "a", "rename": ["a"]}, "rename must be a mapping such as"),
        ({"yolo": "a", "upright": 0}, "upright must be true or false"),
    ],
)
def test_invalid_entry_is_rejected(register, invalid, message):
    with pytest.raises(InputError, match=f"DATASETS.REGISTER.mine.*{message}"):
        register(mine=invalid)


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "a\\b", "..", ".hidden", "-x", "", "a\n", "\0", "x" * 201, 5]
)
def test_name_that_is_not_a_safe_file_name_is_rejected(coco, name):
    with pytest.raises(InputError, match="DATASETS.REGISTER has the invalid name .*use up to 200"):
        register_datasets({name: entry(coco)})
    assert name not in DatasetCatalog


def test_entries_can_be_replaced_but_not_other_datasets(register, coco):
    with pytest.raises(InputError, match="digits_val: a dataset with this name already exists"):
        register_datasets({"digits_val": entry(coco)})
    register(**{"Würfel-1.0": {"json": "none.json", "images": "none"}})
    register(**{"Würfel-1.0": entry(coco)})
    assert len(load_dataset("Würfel-1.0")) == 3


def test_home_and_environment_variables_in_paths_are_expanded(register, coco, monkeypatch):
    monkeypatch.setenv("IMAGES", str(coco.folder))
    monkeypatch.setenv("HOME", str(coco.folder))
    entry(coco)
    register(mine={"json": "~/shapes.json", "images": "$IMAGES"})
    assert len(load_dataset("mine")) == 3
