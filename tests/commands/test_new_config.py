"""fcos-d2 new-config: from a folder of any kind to a config that trains."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcos_d2.commands import new_config
from fcos_d2.config_file import read_cfg
from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.custom import photo
from tests.catalogs import coco_content

SIZE = (96, 72)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """An empty working directory, with a folder data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def images(folder, names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(path)


def write_labels(path, names):
    """A COCO file of images with a box each."""
    objects = {name: [(n % 2 + 1, (10, 12, 30, 40))] for n, name in enumerate(names)}
    path.write_text(json.dumps(coco_content(objects, "abc", SIZE)))


NAMES = [f"{n}.jpg" for n in range(30)]


def write_config(*arguments) -> int:
    return new_config.main(["data", "-o", "mine.yaml", "--device", "cpu", *arguments])


def loaded(name) -> set[str]:
    return {Path(r["file_name"]).name for r in load_dataset(name, filter_empty=False)}


@pytest.fixture
def labels(data):
    """A folder of photos with a COCO file."""
    images(data / "photos", NAMES)
    write_labels(data / "labels.json", NAMES)
    return data / "labels.json"


def test_folder_becomes_a_config_that_loads(labels, capsys):
    assert write_config() == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith("now: fcos-d2 train --config-file mine.yaml\n")
    cfg = read_cfg("mine.yaml")
    assert set(cfg.DATASETS.REGISTER) == {"mine_train", "mine_val"}
    train, test = (loaded(names[0]) for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    assert train and test and not train & test and train | test == set(NAMES)
    assert len(class_names("mine_train")) == cfg.MODEL.FCOS.NUM_CLASSES == 3
    assert cfg.SOLVER.MAX_ITER == 1500 and cfg.OUTPUT_DIR == "output/mine"


@pytest.mark.parametrize(
    "splits, train, test",
    [
        ("train val test", "train", "val"),
        ("train test", "train", "test"),
        ("train val trainval test", "trainval", "test"),
    ],
)
def test_splits_of_the_folder_are_used(splits, train, test):
    found = {split: {"yolo": split} for split in splits.split()}
    entries, *roles, _ = new_config.assign_roles(found, "mine", Path("mine.yaml"))
    assert roles == [f"mine_{train}", f"mine_{test}"]
    assert all(entries[role] == {"yolo": role.removeprefix("mine_")} for role in roles)


def test_defects_come_first(labels, capsys):
    content = json.loads(labels.read_text())
    content["annotations"][0]["category_id"] = 9
    labels.write_text(json.dumps(content))
    assert write_config() == 1
    assert "1 problems must be corrected first: fcos-d2 check" in capsys.readouterr().out


def test_nothing_is_written_over(labels, capsys):
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


def test_list_of_validation_images_is_kept_and_new_images_are_trained_on(labels, data):
    assert write_config() == 0
    before = loaded("mine_val")
    assert 3 <= len(before) <= 9
    more = [*NAMES, *(f"more{n}.jpg" for n in range(20))]
    images(data / "photos", more)
    write_labels(data / "labels.json", more)
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


def test_gpu_starts_from_published_weights(labels):
    assert new_config.main(["data", "-o", "mine.yaml", "--device", "cuda"]) == 0
    cfg = read_cfg("mine.yaml")
    assert cfg.MODEL.WEIGHTS == "zoo://torchvision/fcos_R_50_FPN"
    assert cfg.MODEL.FCOS.CONVENTION == "torchvision"
    assert len(cfg.SOLVER.STEPS) == 2 and cfg.MODEL.FCOS.NUM_CLASSES == 3
