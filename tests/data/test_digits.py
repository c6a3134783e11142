"""Tests the built-in datasets: their content, and how they are written."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from sklearn.datasets import load_digits

from fcos_d2.data import prepare, register_digits
from fcos_d2.data.digits import files, scenes
from fcos_d2.data.digits.__main__ import main
from fcos_d2.data.digits.files import Recipe, ensure_digits
from fcos_d2.errors import InputError

FEW = Recipe(num_images=(4, 2))


def fingerprint(root):
    """Returns file name -> hash of all files under ``root/digits``."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root, "digits").rglob("*"))
        if path.is_file()
    }


def content(root, split):
    return json.loads(files.annotation_file(root, split).read_text())


@pytest.fixture(scope="module")
def handwriting():
    return scenes.load_handwriting("train", seed=0)


@pytest.fixture(scope="module")
def many_scenes(handwriting):
    return [scenes.compose_scene(handwriting, np.random.default_rng(i)) for i in range(150)]


def test_files_are_reproducible_and_depend_on_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ensure_digits(tmp_path / name, FEW._replace(seed=seed))
    first, again, other = (fingerprint(tmp_path / name) for name in "abc")
    assert len(first) == 4 + 2 + 2
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_splits_share_no_handwritten_digit(digits_root):
    train, val = (scenes.load_handwriting(split, seed=0) for split in files.SPLITS)
    assert set(train.sources).isdisjoint(val.sources)
    assert len(train.sources) + len(val.sources) == 1797
    shares = np.bincount(val.labels) / np.bincount(np.r_[train.labels, val.labels])
    np.testing.assert_allclose(shares, scenes.VAL_SHARE, atol=0.005)
    for split, part in zip(files.SPLITS, (train, val), strict=True):
        used = {a["handwritten_digit"] for a in content(digits_root, split)["annotations"]}
        assert used and used <= set(part.sources.tolist())


def test_boxes_are_tight_around_the_changed_pixels(handwriting):
    """Paints digits on a uniform background, and compares the changed pixels with the box."""
    rng = np.random.default_rng(0)
    for index in range(30):
        ink = scenes.enlarge_ink(handwriting.inks[index], 40, rng)
        canvas = np.full((scenes.SIZE, scenes.SIZE, 3), 128, np.float32)
        box = scenes._find_free_box(ink.shape, np.zeros((0, 4), int), np.zeros(0), rng)
        scenes._paint(canvas, ink, box, rng)
        rows, columns = np.nonzero(np.abs((canvas - 128) @ scenes.LUMA) > 2)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_array_equal(found, box)


def test_scenes_vary_in_number_class_and_size_of_digits(many_scenes):
    numbers = np.bincount([len(scene.labels) for scene in many_scenes], minlength=6)
    assert 2 <= numbers[0] <= 15 and (numbers[1:] >= 15).all() and len(numbers) == 6
    labels = np.concatenate([scene.labels for scene in many_scenes])
    assert (np.bincount(labels, minlength=10) >= 20).all()
    boxes = np.concatenate([scene.boxes for scene in many_scenes])
    lengths = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert boxes.min() >= 0 and boxes.max() <= scenes.SIZE
    assert lengths.min() in (15, 16, 17) and lengths.max() in (78, 79, 80)


def test_annotations_match_the_handwritten_digits(digits_root):
    truth = load_digits().target
    for annotation in content(digits_root, "train")["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert annotation["area"] == width * height and annotation["iscrowd"] == 0
        assert 0 <= x < x + width <= 160 and 0 <= y < y + height <= 160
        assert annotation["category_id"] == truth[annotation["handwritten_digit"]] + 1


def test_registration_writes_nothing_and_prepare_generates_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "NUM_IMAGES", (4, 2))
    try:
        register_digits(tmp_path)
        metadata = MetadataCatalog.get("digits_val")
        assert metadata.evaluator_type == "coco" and metadata.thing_classes[3] == "three"
        assert metadata.thing_dataset_id_to_contiguous_id[4] == 3
        assert not list(tmp_path.iterdir())
        prepare("digits_val")
        assert len(COCOEvaluator("digits_val", output_dir=None)._coco_api.imgs) == 2
        assert len(DatasetCatalog.get("digits_train")) == 4
    finally:
        register_digits()


def _make(root):
    ensure_digits(root, FEW)
    return fingerprint(root)


def test_concurrent_processes_generate_the_same_files(tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(_make, [tmp_path] * 3, chunksize=1)
    assert len(found[0]) == 8 and found[0] == found[1] == found[2]
    assert {path.name for path in tmp_path.iterdir()} <= {"digits", "digits.lock"}


def test_files_of_killed_processes_are_deleted(tmp_path):
    (tmp_path / ".digits-left").mkdir()
    ensure_digits(tmp_path, FEW)
    assert not list(tmp_path.glob(".digits-*"))


def test_other_version_is_generated_again(tmp_path, monkeypatch):
    ensure_digits(tmp_path, FEW._replace(version="0.9"))
    monkeypatch.setattr(files, "NUM_IMAGES", (4, 2))
    ensure_digits(tmp_path)
    assert content(tmp_path, "val")["info"]["version"] == files.VERSION
    assert not list(tmp_path.glob(".digits-*"))


def test_other_number_of_images_is_used_with_a_warning(tmp_path, caplog):
    ensure_digits(tmp_path, FEW)
    before = fingerprint(tmp_path)
    ensure_digits(tmp_path)
    assert fingerprint(tmp_path) == before
    assert "(4, 2)" in caplog.text and "python -m fcos_d2.data.digits --root" in caplog.text


def test_other_folder_of_that_name_is_not_overwritten(tmp_path):
    mine = tmp_path / "digits" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(InputError, match="not the built-in dataset.*DETECTRON2_DATASETS"):
        ensure_digits(tmp_path, FEW)
    assert mine.read_text() == "years of work"


def test_root_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/digits .*; set DETECTRON2_DATASETS") as caught:
        ensure_digits(tmp_path / "file", FEW)
    assert "\n" not in str(caught.value)


def test_command_generates_the_given_number_of_images(tmp_path, capsys):
    assert main(["--root", str(tmp_path), "--images", "5"]) == 0
    said = capsys.readouterr().out
    assert said == f"5 training and 1 validation images in {tmp_path / 'digits'}\n"
    assert len(content(tmp_path, "val")["images"]) == 1
    with pytest.raises(SystemExit):
        main(["--images", "0"])
