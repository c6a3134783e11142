"""fcos-d2 new-config: from a folder of any kind to a config that trains."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fcos_d2.commands import new_config
from fcos_d2.config_file import read_cfg
from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.custom import photo
from fcos_d2.data.inspection import inspect_dataset

SIZE = (96, 72)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """An empty working directory, with a folder data; names of its datasets are forgotten."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    before = set(DatasetCatalog)
    yield tmp_path / "data"
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def images(folder, names, size=SIZE):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)


def coco(path, names, classes=lambda n: [n % 2 + 1], box=(10, 12, 30, 40), size=SIZE):
    """A COCO file of images with a box of every class that ``classes`` gives."""
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate("abc", 1)]
    for n, name in enumerate(names):
        width, height = size
        image = {"id": n, "file_name": name, "width": width, "height": height}
        content["images"].append(image)
        for class_ in classes(n):
            annotation = {"id": len(content["annotations"]), "image_id": n, "category_id": class_}
            content["annotations"].append({**annotation, "bbox": list(box), "iscrowd": 0})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


NAMES = [f"{n}.jpg" for n in range(30)]


def write_config(*arguments) -> int:
    return new_config.main(["data", "-o", "mine.yaml", "--device", "cpu", *arguments])


def loaded(name) -> set[str]:
    return {Path(r["file_name"]).name for r in load_dataset(name, filter_empty=False)}


# ---- what is in a folder ----


def one_coco_file(data):
    images(data / "photos", NAMES)
    coco(data / "labels.json", NAMES)
    return {"mine_train", "mine_val"}


def cocos_folders(data):
    for split, names in (("train", NAMES[:20]), ("val", NAMES[20:])):
        images(data / f"{split}2017", names)
        coco(data / "annotations" / f"instances_{split}2017.json", names)
        (data / "annotations" / f"captions_{split}2017.json").write_text('{"images": []}')
    return {"mine_train", "mine_val"}


def roboflow(data):
    for split, names in (("train", NAMES[:15]), ("valid", NAMES[15:20]), ("test", NAMES[20:])):
        images(data / split, names)
        coco(data / split / "_annotations.coco.json", names)
    return {"mine_train", "mine_val", "mine_test"}


def several_coco_files(data):
    for part, names in (("one", NAMES[:15]), ("two", NAMES[15:])):
        images(data / part, names)
        coco(data / part / "labels.json", names)
    return {"mine_train", "mine_val"}


def yolo(data):
    for split, names in (("train", NAMES[:20]), ("valid", NAMES[20:])):
        images(data / split / "images", names)
        (data / split / "labels").mkdir()
        for n, name in enumerate(names):
            path = data / split / "labels" / f"{Path(name).stem}.txt"
            path.write_text(f"{n % 2} 0.3 0.4 0.3 0.5\n")
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [a, b]"
    (data / "data.yaml").write_text(text)
    return {"mine_train", "mine_val"}


def yolo_without_splits(data):
    images(data / "images", NAMES)
    (data / "labels").mkdir()
    (data / "labels" / "classes.txt").write_text("a\nb\n")
    for n, name in enumerate(NAMES):
        (data / "labels" / f"{Path(name).stem}.txt").write_text(f"{n % 2} 0.3 0.4 0.3 0.5\n")
    return {"mine_train", "mine_val"}


def voc_xml(path, file, label="a"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><filename>{file}</filename><object><name>{label}</name><bndbox><xmin>10</xmin>"
        "<ymin>10</ymin><xmax>40</xmax><ymax>50</ymax></bndbox></object></annotation>"
    )


def voc(data):
    images(data / "JPEGImages", NAMES)
    for n, name in enumerate(NAMES):
        voc_xml(data / "Annotations" / f"{n}.xml", name, "ab"[n % 2])
    (data / "ImageSets" / "Main").mkdir(parents=True)
    for split, numbers in (("train", range(10)), ("val", range(10, 20)), ("trainval", range(20))):
        (data / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(map(str, numbers)))
    (data / "ImageSets/Main/test.txt").write_text("\n".join(map(str, range(20, 30))))
    return {"mine_trainval", "mine_test"}


def voc_beside_the_images(data):
    images(data, NAMES)
    for n, name in enumerate(NAMES):
        voc_xml(data / f"{n}.xml", name, "ab"[n % 2])
    return {"mine_train", "mine_val"}


def voc_by_split(data):
    for split, names in (("train", NAMES[:20]), ("valid", NAMES[20:])):
        images(data / split, names)
        for name in names:
            voc_xml(data / split / f"{Path(name).stem}.xml", name)
    return {"mine_train", "mine_val"}


def labelme(data):
    images(data, NAMES)
    for n, name in enumerate(NAMES):
        shape = {"label": "ab"[n % 2], "points": [[10, 10], [40, 50]], "shape_type": "rectangle"}
        content = {"imagePath": name, "shapes": [shape], "imageWidth": 96, "imageHeight": 72}
        (data / f"{n}.json").write_text(json.dumps(content))
    return {"mine_train", "mine_val"}


def via(data):
    images(data / "images", NAMES)
    shape = {"name": "rect", "x": 10, "y": 12, "width": 30, "height": 40}
    region = {"shape_attributes": shape, "region_attributes": {"class": "a"}}
    content = {name: {"filename": name, "regions": [region]} for name in NAMES}
    (data / "via_region_data.json").write_text(json.dumps(content))
    return {"mine_train", "mine_val"}


def cvat(data):
    images(data / "images", NAMES)
    items = "".join(
        f'<image name="{name}"><box label="a" xtl="10" ytl="9" xbr="40" ybr="50"/></image>'
        for name in NAMES
    )
    (data / "annotations.xml").write_text(f"<annotations>{items}</annotations>")
    return {"mine_train", "mine_val"}


LAYOUTS = [one_coco_file, cocos_folders, roboflow, several_coco_files, yolo, yolo_without_splits]
LAYOUTS += [voc, voc_beside_the_images, voc_by_split, labelme, via, cvat]


@pytest.mark.parametrize("make", LAYOUTS)
def test_folder_becomes_a_config_that_loads(data, capsys, make):
    expected = make(data)
    assert write_config() == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith("now: fcos-d2 train --config-file mine.yaml\n")
    cfg = read_cfg("mine.yaml")
    assert set(cfg.DATASETS.REGISTER) == expected
    train, test = (loaded(names[0]) for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    assert train and test and not train & test
    assert len(set().union(*map(loaded, expected))) == 30
    assert not any(inspect_dataset(name).repaired["path"] for name in expected)
    assert len(class_names(cfg.DATASETS.TRAIN[0])) == cfg.MODEL.FCOS.NUM_CLASSES
    assert cfg.SOLVER.MAX_ITER == 1500 and cfg.OUTPUT_DIR == "output/mine"


def test_group_that_roboflow_lists_as_a_class_is_none(data):
    one_coco_file(data)
    content = json.loads((data / "labels.json").read_text())
    group = {"id": 0, "name": "letters", "supercategory": "none"}
    named = [{**category, "supercategory": "letters"} for category in content["categories"]]
    (data / "labels.json").write_text(json.dumps({**content, "categories": [group, *named]}))
    assert write_config() == 0
    assert read_cfg("mine.yaml").MODEL.FCOS.NUM_CLASSES == 3
    assert class_names("mine_train") == class_names("mine_val") == ["a", "b", "c"]


def test_cleaned_file_is_taken_for_its_original(data):
    one_coco_file(data)
    shutil.copy(data / "labels.json", data / "labels_clean.json")
    (data / "labels.json").write_text('{"images": [], "categories": [], "annotations": []}')
    assert write_config() == 0
    assert "labels_clean.json" in Path("mine.yaml").read_text()


@pytest.mark.parametrize(
    "files, text",
    [
        ({}, "data contains no annotations of a known format, but 0 files"),
        ({"a.csv": "", "b.csv": ""}, "but 2 files (2 .csv)"),
        ({"a.json": '{"type": 1, "features": 2}'}, "data/a.json: GeoJSON"),
    ],
)
def test_folder_of_nothing_known_says_what_it_looks_like(data, capsys, files, text):
    for name, content in files.items():
        (data / name).write_text(content)
    assert write_config() == 2
    assert text in capsys.readouterr().err


def test_defects_come_first(data, capsys):
    one_coco_file(data)
    coco(data / "labels.json", NAMES, box=(10, 12, None, 5))
    content = json.loads((data / "labels.json").read_text())
    content["annotations"][0]["bbox"] = [1, 2, 30, 40]
    content["annotations"][1]["bbox"] = [1, 2, 30, 40]
    (data / "labels.json").write_text(json.dumps(content))
    assert write_config() in (1, 2)


def test_nothing_is_written_over(data, capsys):
    one_coco_file(data)
    Path("mine.yaml").write_text("mine")
    assert write_config() == 2 and Path("mine.yaml").read_text() == "mine"
    assert "mine.yaml exists" in capsys.readouterr().err


# ---- the validation set ----


def test_every_class_has_its_share_and_copies_stay_together():
    rng = np.random.default_rng(0)
    labels = {}
    for n in range(400):
        classes = {0} if n % 2 else {1}
        classes |= {2} if n % 20 == 0 else set()
        classes |= {3} if n % 100 == 0 else set()
        classes |= {4} if n == 7 else set()
        for copy in range(rng.integers(1, 4)):
            labels[f"photo{n}_jpg.rf.{copy}a.jpg"] = classes
    chosen = new_config.choose_validation(labels)
    photos = {photo(name) for name in chosen}
    assert chosen == {name for name in labels if photo(name) in photos}
    groups = {photo(name): classes for name, classes in labels.items()}
    total, taken = (
        Counter(c for group in part for c in groups[group]) for part in (groups, photos)
    )
    for class_ in range(3):
        assert abs(taken[class_] / total[class_] - 0.2) < 0.07, (class_, taken, total)
    assert taken[3] == 1 and taken[4] == 0


def test_few_photos_change_sides_when_more_are_added():
    labels = {f"{n}.jpg": {n % 3} | ({3} if n % 40 == 0 else set()) for n in range(500)}
    before = new_config.choose_validation(dict(list(labels.items())[:300]))
    after = new_config.choose_validation(labels)
    assert len(before - after) + len((after - before) & set(list(labels)[:300])) <= 3


def test_list_of_validation_images_is_kept_and_new_images_are_trained_on(data, capsys):
    one_coco_file(data)
    assert write_config() == 0
    before = loaded("mine_val")
    assert 3 <= len(before) <= 9
    more = [*NAMES, *(f"more{n}.jpg" for n in range(20))]
    images(data / "photos", more)
    coco(data / "labels.json", more)
    read_cfg("mine.yaml")
    assert loaded("mine_val") == before and len(loaded("mine_train")) == 50 - len(before)
    Path("mine.yaml").unlink()
    assert write_config() == 0 and "mine_val.txt, which existed" in Path("mine.yaml").read_text()
    assert loaded("mine_val") == before


# ---- the recipe ----


def records(size, side, count=100):
    box = {"bbox": [5, 5, side, side], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    record = {"width": size[0], "height": size[1], "annotations": [box]}
    return [record] * count


@pytest.mark.parametrize(
    "size, side, has_gpu, expected",
    [
        ((640, 480), 40, False, ["MIN_SIZE_TEST: 240", "FPN_STRIDES: [8, 16]"]),
        ((640, 480), 160, False, ["MIN_SIZE_TEST: 128"]),  # large objects: a small input will do
        ((100, 80), 10, False, ["MIN_SIZE_TEST: 160"]),  # at most twice as large
        ((1280, 960), 60, True, ["MIN_SIZE_TEST: 384"]),
        ((4000, 3000), 16, False, ["MIN_SIZE_TEST: 0", 'TYPE: "absolute", SIZE: [512, 512]']),
        ((4000, 3000), 16, True, ["MIN_SIZE_TEST: 0", "SIZE: [800, 800]"]),
    ],
)
def test_recipe_follows_the_sizes_of_images_and_boxes(size, side, has_gpu, expected):
    made = new_config.recipe(new_config.fingerprint(records(size, side)), has_gpu)
    text = "\n".join(str(value) for value in made.values())
    assert all(line in text for line in expected), text


def test_length_of_training_follows_the_amount_of_data():
    few, many = (
        new_config.recipe(new_config.fingerprint(records((640, 480), 40, n)), False)
        for n in (50, 10_000)
    )
    assert few["iterations"] == 1500 and many["iterations"] == 50_000 and many["epochs"] == 20


def test_gpu_starts_from_published_weights(data):
    one_coco_file(data)
    assert new_config.main(["data", "-o", "mine.yaml", "--device", "cuda"]) == 0
    cfg = read_cfg("mine.yaml")
    assert cfg.MODEL.WEIGHTS == "zoo://torchvision/fcos_R_50_FPN"
    assert cfg.MODEL.FCOS.CONVENTION == "torchvision"
    assert len(cfg.SOLVER.STEPS) == 2 and cfg.MODEL.FCOS.NUM_CLASSES == 3
