"""Tests loading of registered datasets, and its error messages."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from torch.utils.data import IterableDataset

from fcos_d2.data import check_class_order, check_num_classes, load_dataset, prepare
from fcos_d2.data.inspection import clean, inspect_dataset
from fcos_d2.errors import InputError
from tests.catalogs import register_function


def message(function, *arguments, **options):
    """Returns the message of the InputError that ``function`` raises."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_valid_dataset_loads_the_same_records_as_detectron2(coco):
    name = coco.register()
    assert load_dataset(name) == DatasetCatalog.get(name)
    assert load_dataset([name, name]) == 2 * DatasetCatalog.get(name)


def test_metadata_with_other_classes_than_the_file_is_rejected(coco):
    name = coco.register()
    MetadataCatalog.get(name).thing_classes = ["box", "disc"]
    text = message(load_dataset, name)
    assert "the classes disc, box, but its metadata has box, disc" in text
    assert "MetadataCatalog.remove('shapes_train')" in text


def test_filter_empty_drops_images_without_objects(coco):
    coco.content["annotations"][0]["iscrowd"] = 1
    coco.content["annotations"].pop(1)
    name = coco.register()
    assert [r["image_id"] for r in load_dataset(name)] == [3]
    assert [r["image_id"] for r in load_dataset(name, filter_empty=False)] == [1, 2, 3]


def test_masks_are_dropped_from_copies_of_the_records():
    box = {"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    masked = {**box, "segmentation": [[0.0, 0, 5, 0, 5, 5]]}
    records = [{"file_name": "", "annotations": [masked, box]}]
    name = register_function(lambda: records, thing_classes=["disc"])
    assert load_dataset(name, masks=True) == records
    assert load_dataset(name) == [{"file_name": "", "annotations": [box, box]}]
    assert records[0]["annotations"][0] is masked and "segmentation" in masked
    unlabeled = register_function(lambda: [{"file_name": ""}], "unlabeled")
    assert load_dataset(unlabeled) == [{"file_name": ""}]


# Detectron2 drops the first masks and cannot read the others.
DROPPED_MASKS = ([[]], [[5, 6, 25, 16]], [[5, 6, 25, 6, 25, 16, 5]], "text")
INVALID_MASKS = (3, [3], {"counts": [0, 2400]}, {"counts": [0, -1], "size": [40, 60]})


@pytest.mark.parametrize("mask", DROPPED_MASKS + INVALID_MASKS, ids=str)
def test_boxes_with_invalid_masks_are_kept_if_masks_are_not_used(coco, mask):
    coco.content["annotations"][1]["segmentation"] = mask
    name = coco.register()
    assert [len(record["annotations"]) for record in load_dataset(name)] == [1, 1, 1]
    assert inspect_dataset(name).num_problems == 0


@pytest.mark.parametrize("mask", INVALID_MASKS, ids=str)
def test_invalid_mask_is_reported_if_masks_are_used(coco, mask):
    coco.content["annotations"][1]["segmentation"] = mask
    name = coco.register()
    expected = "annotation 102: segmentation must be polygons or run lengths"
    with pytest.raises(InputError, match=expected):
        load_dataset(name, masks=True)
    found = inspect_dataset(name, masks=True)
    assert [problem.kind for problem in found.problems] == ["mask"]
    (cleaned,) = clean([found], [found], masks=True)
    assert [annotation["id"] for annotation in cleaned.content["annotations"]] == [101, 103]


@pytest.mark.parametrize(
    "shape",
    [
        {"segmentation": {"counts": "PPYo0"}},  # compressed: detectron2 does not need a size
        {"segmentation": {"counts": [0, 2400.0], "size": [40, 60]}},
    ],
    ids=str,
)
def test_masks_that_detectron2_loads_are_valid(coco, shape):
    coco.content["annotations"][1].update(shape)
    name = coco.register()
    assert load_dataset(name, masks=True) == DatasetCatalog.get(name)
    assert inspect_dataset(name, masks=True).num_problems == 0


def test_unknown_name_suggests_similar_names_and_shows_how_to_register():
    for function in (load_dataset, prepare):
        text = message(function, "digit_train")
        assert "unknown dataset 'digit_train'" in text
        assert "did you mean digits_train" in text
        assert "DATASETS: {REGISTER: {digit_train: {json: annotations.json, " in text
    assert "did you mean" not in message(load_dataset, "zzzzqqqq")


def test_empty_list_of_names_is_rejected():
    assert "set DATASETS.TRAIN or DATASETS.TEST" in message(load_dataset, [])


def test_missing_annotation_file_is_reported_with_the_datasets_folder(coco, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    name = coco.register()
    coco.json_file.unlink()
    text = message(load_dataset, name)
    assert f"annotation file {coco.json_file} does not exist" in text
    assert "DETECTRON2_DATASETS" in text and "./datasets" in text
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data/sets")
    assert "/data/sets" in message(prepare, name)


@pytest.mark.parametrize(
    "broken, place",
    [
        ('{"images": [],\n "categories"; []}', "line 2 column 14"),
        ('{"images": [], "cat', "line 1 column 16"),
        ("", "line 1 column 1"),
    ],
    ids=["syntax error", "truncated", "empty"],
)
def test_invalid_json_is_reported_with_line_and_column(coco, broken, place):
    text = message(load_dataset, coco.register(text=broken))
    assert f"{coco.json_file} is not valid JSON" in text and f"in {place}" in text


def test_json_that_is_not_coco_is_rejected(coco):
    text = message(load_dataset, coco.register(text="[]"))
    assert f"{coco.json_file} must be a COCO file, but is JSON of type list" in text


def test_boxes_of_zero_size_cause_a_warning(coco, caplog):
    coco.content["annotations"].append(coco.annotation(200, 1, 1, (1, 2, 0, 4)))
    with caplog.at_level(logging.WARNING, "fcos_d2"):
        assert len(load_dataset(coco.register())) == 3
    assert "1 boxes have zero width or height; training and evaluation ignore" in caplog.text


def test_missing_image_is_reported_with_the_number_of_missing_images(coco):
    name = coco.register()
    (coco.folder / "2.png").unlink()
    text = message(load_dataset, name)
    assert f"image {coco.folder / '2.png'}: no such file (missing: 1 of 3)" in text
    assert "DETECTRON2_DATASETS" in text


def test_folder_that_contains_the_images_is_suggested(coco, monkeypatch):
    monkeypatch.chdir(coco.folder)
    (coco.folder / "moved" / "here").mkdir(parents=True)
    for number in (1, 2, 3):
        (coco.folder / f"{number}.png").rename(coco.folder / "moved" / "here" / f"{number}.png")
    (coco.folder / "empty").mkdir()
    coco.json_file.write_text(json.dumps(coco.content))
    register_coco_instances("lost", {}, str(coco.json_file), "empty")
    text = message(load_dataset, "lost")
    assert "image empty/1.png: no such file (missing: 3 of 3); 1.png is in moved/here" in text
    (problem,) = inspect_dataset("lost").problems
    assert problem.text in text


def test_dataset_without_objects_is_rejected_if_empty_images_are_filtered(coco):
    coco.content["annotations"] = []
    name = coco.register()
    assert len(load_dataset(name, filter_empty=False)) == 3
    assert "'shapes_train': there are no annotations; check that" in message(load_dataset, name)


def test_datasets_with_different_classes_are_rejected(coco, registered_digits):
    text = message(load_dataset, ["digits_val", coco.register()])
    assert "datasets 'digits_val', 'shapes_train' have different classes" in text


def test_boxes_may_be_arrays_and_annotations_are_optional():
    box = {"bbox": np.float32([1, 2, 3, 4]), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    for name, record in (("arrays", {"annotations": [box]}), ("unlabeled", {"image_id": 1})):
        assert len(load_dataset(register_function(lambda record=record: [record], name))) == 1


@pytest.mark.parametrize("place", [0, 1])
def test_missing_annotations_become_an_empty_list(place):
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    records = [{"image_id": 1, "annotations": [box]}]
    records.insert(place, {"image_id": 2})
    name = register_function(lambda: records, thing_classes=["disc"])
    loaded = load_dataset(name, filter_empty=False)
    assert loaded[place] == {"image_id": 2, "annotations": []} and len(loaded) == 2
    assert [record["image_id"] for record in load_dataset(name)] == [1]
    assert "annotations" not in records[place]


def test_iterable_dataset_is_returned_unchanged():
    class Endless(IterableDataset):
        def __iter__(self):
            raise AssertionError("load_dataset must not iterate over it")

    assert isinstance(load_dataset(register_function(Endless, thing_classes=["disc"])), Endless)


def test_os_error_in_a_registered_function_is_reported():
    text = message(load_dataset, register_function(Path("/no/such/labels.txt").read_text))
    assert "dataset 'custom': " in text and "/no/such/labels.txt" in text


def test_wrong_number_of_classes_is_reported_with_the_key_and_value_to_set(coco, registered_digits):
    check_num_classes(["digits_train", "digits_val"], 10)
    text = message(check_num_classes, "digits_train", 80)
    assert text == (
        "dataset 'digits_train' has 10 classes (zero, one, two, ...) but the model has 80; "
        "set MODEL.FCOS.NUM_CLASSES 10"
    )
    name = coco.register()  # not loaded yet
    assert "has 2 classes (disc, box)" in message(check_num_classes, ["digits_val", name], 10)
    check_num_classes(name, 2)


@pytest.mark.parametrize("classes", [["disc", "disc"], ["disc", " "]])
def test_duplicate_and_empty_class_names_are_rejected(classes):
    records = [{"file_name": "", "annotations": []}]
    text = message(load_dataset, register_function(lambda: records, thing_classes=classes), False)
    assert f"classes are named {classes[1]!r}" in text


def test_class_order_that_differs_from_the_training_data_is_rejected(coco):
    train = coco.register("order_train")
    coco.json_file = coco.folder / "val.json"
    coco.content["categories"] = [{"id": 1, "name": "box"}, {"id": 2, "name": "disc"}]
    val = coco.register("order_val")
    check_class_order([train], train)
    text = message(check_class_order, [train], val)
    assert "class 0 is box, but disc in the training data" in text
    assert "set classes: ['disc', 'box'] in DATASETS.REGISTER.order_val" in text
    (coco.folder / "shapes.json").unlink()
    MetadataCatalog.remove(train)
    check_class_order([train], val)  # the training data is not available
