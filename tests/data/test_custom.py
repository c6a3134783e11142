"""Data sets described in the config: their files, classes and parts."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fcos_d2.data import class_names, count_classes, load_dataset, register_datasets
from fcos_d2.data.custom import chooser, photo
from fcos_d2.data.inspection import inspect_dataset
from fcos_d2.errors import InputError


def entry(coco, **more) -> dict:
    coco.json_file.write_text(json.dumps(coco.content))
    return {"json": str(coco.json_file), "images": str(coco.folder), **more}


def labels(name) -> list[list[str]]:
    """Class names of the objects of every image."""
    names = class_names(name)
    records = load_dataset(name, filter_empty=False)
    return [[names[a["category_id"]] for a in record["annotations"]] for record in records]


def test_described_coco_file_is_what_detectron2_loads(described, coco):
    described(mine=entry(coco))
    assert class_names("mine") == ["disc", "box"] and count_classes("mine") == 2
    records = load_dataset("mine")
    assert records == load_dataset(coco.register())
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    assert class_names("mine") == MetadataCatalog.get("mine").thing_classes


def test_nothing_is_read_before_it_is_needed(described):
    described(mine={"json": "none.json", "images": "none"})
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
def test_augmented_copies_are_known_by_their_names(name, original):
    assert photo(name) == original


def test_parts_share_no_photo_and_lose_none():
    names = [f"{n}.png" for n in range(300)]
    parts = [set(filter(chooser(part), names)) for part in ((0, 0.8), (0.8, 1))]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 300
    assert 210 < len(parts[0]) < 270
    copies = [f"{n}_png.rf.{hash_}.jpg" for n in range(50) for hash_ in ("0a", "1b")]
    taken = [photo(name) for name in filter(chooser((0, 0.5)), copies)]
    assert 10 < len(set(taken)) < 40 and all(taken.count(name) == 2 for name in taken)


def test_part_can_be_a_list_of_images_and_all_others(described, coco, tmp_path):
    (tmp_path / "val.txt").write_text("\ufeff2.png\n\n", encoding="utf-8")
    path = str(tmp_path / "val.txt")
    described(val=entry(coco, part=path), train=entry(coco, part=f"not {path}"))
    found = [[r["image_id"] for r in load_dataset(name)] for name in ("val", "train")]
    assert found == [[2], [1, 3]]


def test_part_is_decided_by_the_file_on_disk(described, coco):
    parts = []
    for folder in ("", "..\\images\\"):
        for number, image in enumerate(coco.content["images"], 1):
            image["file_name"] = f"{folder}{number}.png"
        described(mine=entry(coco, part=[0, 0.5]))
        parts.append([record["image_id"] for record in inspect_dataset("mine").records])
    assert parts[0] == parts[1]


def test_problem_in_a_part_is_told_by_that_part_alone(described, coco):
    coco.content["annotations"][0]["bbox"] = None
    (coco.folder / "val.txt").write_text("1.png")
    path = str(coco.folder / "val.txt")
    described(val=entry(coco, part=path), train=entry(coco, part=f"not {path}"))
    with pytest.raises(InputError, match=f"{coco.json_file}: annotation 101: bbox is missing"):
        load_dataset("val")
    assert len(load_dataset("train")) == 2
    assert [inspect_dataset(name).num_problems for name in ("val", "train")] == [1, 0]


def test_part_without_images_says_so(described, coco):
    described(mine=entry(coco, part=[0, 1e-9]))
    with pytest.raises(InputError, match=r"part \(?\[?0, 1e-09.* contains no image of"):
        load_dataset("mine")


# ---- classes ----


def test_classes_choose_and_order(described, coco):
    described(mine=entry(coco, classes=["box", "disc"]), one=entry(coco, classes=["box"]))
    assert class_names("mine") == ["box", "disc"]
    assert labels("mine") == [["box"], ["disc"], ["box"]]
    assert class_names("one") == ["box"] and labels("one") == [["box"], [], ["box"]]
    assert len(load_dataset("one")) == 2
    described(more=entry(coco, classes=["never", "disc"]))
    assert class_names("more") == ["never", "disc"] and labels("more") == [[], ["disc"], []]


def test_classes_are_renamed_and_merged(described, coco):
    described(
        renamed=entry(coco, rename={"box": "crate"}),
        merged=entry(coco, rename={"box": "thing", "disc": "thing"}),
        both=entry(coco, rename={"box": "thing"}, classes=["thing"]),
    )
    assert class_names("renamed") == ["disc", "crate"]
    assert labels("renamed") == [["crate"], ["disc"], ["crate"]]
    assert class_names("merged") == ["thing"] and labels("merged") == [["thing"]] * 3
    assert labels("both") == [["thing"], [], ["thing"]]


def test_classes_of_one_name_are_merged_on_demand(described, coco):
    coco.content["categories"][1]["name"] = "disc"
    described(mine=entry(coco, rename={"disc": "disc"}))
    assert class_names("mine") == ["disc"] and labels("mine") == [["disc"]] * 3


@pytest.mark.parametrize(
    "more, text",
    [
        ({"rename": {"bok": "crate"}}, "rename names bok, which is not a class; did you mean box"),
        ({"rename": {"x": "y"}}, "rename names x, which is not a class; it has disc, box"),
        (
            {"classes": ["cat", "dog"]},
            r"it has none of the classes \['cat', 'dog'\]; its classes are disc, box",
        ),
    ],
)
def test_unknown_class_names_are_told(described, coco, more, text):
    described(mine=entry(coco, **more))
    for use in (class_names, load_dataset):
        with pytest.raises(InputError, match=text):
            use("mine")


def test_several_files_become_one_data_set(described, coco, tmp_path):
    first = entry(coco)
    coco.content["categories"] = [{"id": 5, "name": "box"}, {"id": 9, "name": "ring"}]
    for annotation in coco.content["annotations"]:
        annotation["category_id"] = 5 + 4 * (annotation["image_id"] % 2)
    (tmp_path / "more.json").write_text(json.dumps(coco.content))
    both = {"json": [first["json"], str(tmp_path / "more.json")], "images": str(coco.folder)}
    described(mine=both, pattern={**both, "json": str(tmp_path / "*.json")})
    assert class_names("mine") == ["disc", "box", "ring"]
    assert labels("mine") == [["box"], ["disc"], ["box"], ["ring"], ["box"], ["ring"]]
    assert len({record["image_id"] for record in load_dataset("mine")}) == 6
    assert len(load_dataset("pattern")) == 6
    coco.content["annotations"][0]["bbox"] = None
    (tmp_path / "more.json").write_text(json.dumps(coco.content))
    (problem,) = inspect_dataset("mine").problems
    assert problem.text.startswith(f"{tmp_path / 'more.json'}: annotation 101: ")


# ---- descriptions ----


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("labels.json", "must say where the data is, got 'labels.json'"),
        ({}, "must say where the data is"),
        ({"json": "a"}, "has no 'images'"),
        ({"json": 5, "images": "a"}, "json must be a path or a list of paths"),
        ({"json": ["a", "b", "c"], "images": ["a", "b"]}, "images must be one folder, or one for"),
        ({"json": "a", "images": "b", "image": "c"}, "unknown key 'image'"),
        ({"json": "a", "images": "b", "split": "c"}, "unknown key 'split'"),
        ({"json": "a", "images": "b", "part": 0.8}, r"two shares such as \[0, 0.8\].*, got 0.8"),
        ({"voc": "a", "split": "b", "classes": "dog"}, "a list of different names, got 'dog'"),
        ({"voc": "a", "classes": ["dog", "dog"]}, "a list of different names"),
        ({"voc": {"xml": "a"}}, r"voc must be a folder or \{xml: folder, images: folder\}"),
        ({"voc": "a", "split": 5}, "split must be a name, got 5"),
        ({"yolo": "a", "rename": ["a"]}, "rename must be a mapping such as"),
        ({"yolo": "a", "upright": 0}, "upright must be true or false"),
    ],
)
def test_entry_that_makes_no_sense_is_one_line(described, wrong, message):
    with pytest.raises(InputError, match=f"DATASETS.REGISTER.mine.*{message}"):
        described(mine=wrong)


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "a\\b", "..", ".hidden", "-x", "", "a\n", "\0", "x" * 201, 5]
)
def test_name_that_could_be_a_path_is_refused(coco, name):
    with pytest.raises(InputError, match="DATASETS.REGISTER has the name .*use letters, digits"):
        register_datasets({name: entry(coco)})
    assert name not in DatasetCatalog


def test_names_of_other_data_are_not_taken_over_but_ones_own_may_change(described, coco):
    with pytest.raises(InputError, match="digits_val: a dataset of this name exists"):
        register_datasets({"digits_val": entry(coco)})
    described(**{"Würfel-1.0": {"json": "none.json", "images": "none"}})
    described(**{"Würfel-1.0": entry(coco)})
    assert len(load_dataset("Würfel-1.0")) == 3


def test_home_and_variables_in_paths_are_replaced(described, coco, monkeypatch):
    monkeypatch.setenv("PICTURES", str(coco.folder))
    monkeypatch.setenv("HOME", str(coco.folder))
    entry(coco)
    described(mine={"json": "~/shapes.json", "images": "$PICTURES"})
    assert len(load_dataset("mine")) == 3
