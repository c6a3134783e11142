"""Tests the new-config command."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcos_d2.commands import new_config
from fcos_d2.config_file import read_cfg
from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.custom import original_name
from tests.catalogs import coco_content

SIZE = (96, 72)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Makes an empty working directory with the folder data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write_images(folder, names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(path)


def write_labels(path, names):
    """Writes a COCO file of images with one box each."""
    objects = {name: [(n % 2 + 1, (10, 12, 30, 40))] for n, name in enumerate(names)}
    path.write_text(json.dumps(coco_content(objects, "abc", SIZE)))


NAMES = [f"{n}.jpg" for n in range(30)]


def write_config(*arguments) -> int:
    return new_config.main(["data", "-o", "mine.yaml", "--device", "cpu", *arguments])


def loaded(name) -> set[str]:
    return {Path(r["file_name"]).name for r in load_dataset(name, filter_empty=False)}


@pytest.fixture
def labels(data):
    """Writes photos and their COCO file."""
    write_images(data / "photos", NAMES)
    write_labels(data / "labels.json", NAMES)
    return data / "labels.json"


def test_written_config_loads(labels, capsys):
    assert write_config() == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith("next: fcos-d2 train --config-file mine.yaml\n")
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
def test_existing_splits_are_used(splits, train, test):
    found = {split: {"yolo": split} for split in splits.split()}
    entries, *roles, _ = new_config.assign_roles(found, "mine", Path("mine.yaml"))
    assert roles == [f"mine_{train}", f"mine_{test}"]
    assert all(entries[role] == {"yolo": role.removeprefix("mine_")} for role in roles)


def test_defects_must_be_corrected_first(labels, capsys):
    content = json.loads(labels.read_text())
    content["annotations"][0]["category_id"] = 9
    labels.write_text(json.dumps(content))
    assert write_config() == 1
    assert "1 problems must be corrected first: fcos-d2 check" in capsys.readouterr().out


def test_existing_config_is_not_overwritten(labels, capsys):
    Path("mine.yaml").write_text("mine")
    assert write_config() == 2 and Path("mine.yaml").read_text() == "mine"
    assert "mine.yaml exists" in capsys.readouterr().err


# ---- Validation set ----


def test_validation_set_is_balanced_and_keeps_copies_together():
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
    names = {original_name(name) for name in chosen}
    assert chosen == {name for name in labels if original_name(name) in names}
    groups = {original_name(name): classes for name, classes in labels.items()}
    total, taken = (Counter(c for name in part for c in groups[name]) for part in (groups, names))
    for class_ in range(3):
        assert abs(taken[class_] / total[class_] - 0.2) < 0.07, (class_, taken, total)
    assert taken[3] == 1 and taken[4] == 0


def test_existing_list_is_kept_and_new_images_are_for_training(labels, data):
    assert write_config() == 0
    before = loaded("mine_val")
    assert 3 <= len(before) <= 9
    more = [*NAMES, *(f"more{n}.jpg" for n in range(20))]
    write_images(data / "photos", more)
    write_labels(data / "labels.json", more)
    read_cfg("mine.yaml")
    assert loaded("mine_val") == before and len(loaded("mine_train")) == 50 - len(before)
    Path("mine.yaml").unlink()
    assert write_config() == 0 and "the existing mine_val.txt" in Path("mine.yaml").read_text()
    assert loaded("mine_val") == before


# ---- Settings ----


def settings_for(size, side, has_gpu, count=100):
    box = {"bbox": [5, 5, side, side], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    record = {"width": size[0], "height": size[1], "annotations": [box]}
    return new_config.choose_settings(new_config.measure([record] * count), has_gpu)


@pytest.mark.parametrize(
    "size, side, has_gpu, expected",
    [
        ((640, 480), 40, False, ["MIN_SIZE_TEST: 240", "FPN_STRIDES: [8, 16]"]),
        ((640, 480), 160, False, ["MIN_SIZE_TEST: 128"]),  # large objects need a small input
        ((100, 80), 10, False, ["MIN_SIZE_TEST: 160"]),  # at most twice as large
        ((1280, 960), 60, True, ["MIN_SIZE_TEST: 384"]),
        ((4000, 3000), 16, False, ["MIN_SIZE_TEST: 0", 'TYPE: "absolute", SIZE: [512, 512]']),
        ((4000, 3000), 16, True, ["MIN_SIZE_TEST: 0", "SIZE: [800, 800]"]),
    ],
)
def test_settings_depend_on_the_sizes_of_images_and_boxes(size, side, has_gpu, expected):
    text = "\n".join(map(str, settings_for(size, side, has_gpu).values()))
    assert all(line in text for line in expected), text


def test_number_of_iterations_depends_on_the_number_of_images():
    few, many = (settings_for((640, 480), 40, False, count) for count in (50, 10_000))
    assert few["iterations"] == 1500 and many["iterations"] == 50_000 and many["epochs"] == 20


def test_config_for_a_gpu_starts_from_published_weights(labels):
    assert new_config.main(["data", "-o", "mine.yaml", "--device", "cuda"]) == 0
    cfg = read_cfg("mine.yaml")
    assert cfg.MODEL.WEIGHTS == "zoo://torchvision/fcos_R_50_FPN"
    assert cfg.MODEL.FCOS.CONVENTION == "torchvision"
    assert len(cfg.SOLVER.STEPS) == 2 and cfg.MODEL.FCOS.NUM_CLASSES == 3
