"""Tests how loading, checking and cleaning handle every defect."""

import gzip
import json
import logging

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.defects import DEFECTS, is_written_as_corners
from fcos_d2.data.inspection import clean, inspect_dataset
from fcos_d2.data.records import explain_missing_objects
from fcos_d2.errors import InputError
from tests.catalogs import register_function

BOX = [5, 6, 20, 10]  # of every annotation in CocoData


def annotate(**change):
    """Changes the annotation of image 2."""
    return lambda content: content["annotations"][1].update(change)


def entry(key, index, **change):
    return lambda content: content[key][index].update(change)


def repeat(key, **change):
    """Appends a copy of the first entry."""
    return lambda content: content[key].append({**content[key][0], **change})


def remove(key, *fields):
    def change(content):
        for item in content[key]:
            for field in fields:
                del item[field]

    return change


def text_references(content):
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
        annotation["category_id"] = str(annotation["category_id"])


def text_ids(content):
    for image in content["images"]:
        image["id"] = str(image["id"])


def mixed_ids(content):
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = "first"


def masks_for_boxes(content):
    content["annotations"][0].update(bbox=None, segmentation=[[5, 6, 25, 6, 25, 16, 5, 16]])
    del content["annotations"][1]["bbox"]
    content["annotations"][1]["segmentation"] = [5, 6, 25, 6, 25, 16]


def move(prefix):
    def change(content):
        for image in content["images"]:
            image["file_name"] = f"{prefix}{image['file_name']}"

    return change


# Changes to the data, and the number of repairs by key of DEFECTS.
REPAIRED = [
    (annotate(bbox=[25, 16, -20, -10]), {"negative": 1}),
    (annotate(bbox=["5", " 6", "20.0", "10"]), {"number": 1}),
    (annotate(bbox=["5", 16, 20, "-10"]), {"number": 1, "negative": 1}),
    (masks_for_boxes, {"no box": 2}),
    (annotate(iscrowd="False"), {"flag": 1}),
    (annotate(iscrowd=None), {}),
    (remove("annotations", "id"), {"id": 3}),
    (annotate(id=101), {"id": 1}),
    (annotate(id=[1]), {"id": 1}),
    (text_references, {"reference": 6}),
    (text_ids, {"reference": 3}),
    (repeat("annotations"), {"same annotation": 1}),
    (repeat("images"), {"same image": 1}),
    (repeat("categories", supercategory="shape"), {"same category": 1}),
    (entry("categories", 0, name=" disc\r\n"), {"class name": 1}),
    (entry("images", 1, width=60.0, height="40"), {"number": 1}),
    (entry("images", 1, width=None), {"no size": 1}),
    (entry("images", 1, height=-40, width="?"), {"no size": 1}),
    (remove("images", "width", "height"), {"no size": 3}),
    (move("/data/upload/7/"), {"path": 3}),
    (move("..\\media\\"), {"path": 3}),
]


@pytest.mark.parametrize("change, repaired", REPAIRED)
def test_unambiguous_defect_is_repaired_by_load_check_and_clean(coco, caplog, change, repaired):
    change(coco.content)
    name = coco.register()
    with caplog.at_level(logging.WARNING, "fcos_d2"):
        records = load_dataset(name)
    assert [len(record["annotations"]) for record in records] == [1, 1, 1]
    assert records[1]["annotations"][0]["bbox"] == BOX
    assert [(record["width"], record["height"]) for record in records] == [(60, 40)] * 3
    assert class_names(name) == ["disc", "box"]
    for kind, count in repaired.items():
        assert f"{count} {DEFECTS[kind].what}: {DEFECTS[kind].repair}" in caplog.text
    found = inspect_dataset(name)
    assert found.num_problems == 0 and found.repaired == repaired and found.records == records
    (cleaned,) = clean([found], [found])
    assert cleaned.num_before == 3 and not cleaned.removed
    coco.content = cleaned.content
    after = inspect_dataset(coco.register("cleaned"))
    assert not after.repaired and not after.problems
    boxes, boxes_after = (
        [a["bbox"] for record in found for a in record["annotations"]]
        for found in (records, after.records)
    )
    assert boxes == boxes_after


# Changes to the annotation of image 2, key of DEFECTS, and message.
BROKEN = [
    (annotate(bbox=None), "box", "annotation 102: bbox is missing"),
    (annotate(bbox=[1, 2, 3]), "box", r"bbox must be numbers \[x, y, width, height\], got \[1, 2"),
    (annotate(bbox=[1, 2, "x", 4]), "box", r"bbox must be numbers .* got \[1, 2, 'x', 4\]"),
    (annotate(bbox=[1, 2, float("nan"), 4]), "box", "bbox must be finite, got .*; correct or"),
    (annotate(bbox=["inf", 2, 3, 4]), "box", "bbox must be finite"),
    (annotate(bbox=[1, 2, -9, 4]), "box", r"bbox \[1, 2, -9, 4\] has a negative size"),
    (annotate(bbox=None, segmentation=[[1, 2, 3, 4]]), "box", "bbox is missing"),
    (annotate(category_id=9), "category_id", r"category_id 9 is not an id in the file \(1, 2\)"),
    (annotate(image_id=77), "image_id", r"image_id 77 is not an id in the file \(1, 2, 3\)"),
    (annotate(image_id=[2]), "image_id", r"image_id \[2\] is not an id in the file"),
    (annotate(iscrowd=[]), "iscrowd", r"iscrowd must be 0 or 1, got \[\]"),
    (lambda content: content["annotations"][1].pop("image_id"), "entry", "'image_id' is missing"),
    (lambda c: c["annotations"][1].pop("category_id"), "entry", "'category_id' is missing"),
]


@pytest.mark.parametrize("change, kind, text", BROKEN)
def test_ambiguous_defect_is_rejected_listed_and_dropped(coco, change, kind, text):
    change(coco.content)
    name = coco.register()
    with pytest.raises(InputError, match=f"{coco.json_file}: annotation 102: .*") as caught:
        load_dataset(name)
    assert caught.match(text) and "\n" not in str(caught.value)
    found = inspect_dataset(name)
    assert [problem.kind for problem in found.problems] == [kind]
    assert [len(record["annotations"]) for record in found.records] == [1, 0, 1]
    (cleaned,) = clean([found], [found])
    assert [a["id"] for a in cleaned.content["annotations"]] == [101, 103]
    assert cleaned.removed == [f"1 {DEFECTS[kind].what}"] and cleaned.num_before == 3


@pytest.mark.parametrize(
    "change, text",
    [
        (repeat("images", width=61), "two different images have the id 1; use unique ids"),
        (entry("images", 1, file_name=None), "image 2 has no 'file_name'"),
        (lambda content: content["images"][1].pop("id"), "entry 1 of 'images' has no valid 'id'"),
        (lambda content: content["images"].append(3), "entry 3 of 'images' is not a JSON object"),
    ],
)
def test_invalid_image_is_reported_and_dropped_with_its_annotations(coco, change, text):
    change(coco.content)
    name = coco.register()
    with pytest.raises(InputError, match=text):
        load_dataset(name)
    found = inspect_dataset(name)
    assert text in found.problems[0].text
    kept = {record["image_id"] for record in found.records}
    (cleaned,) = clean([found], [found])
    assert {image["id"] for image in cleaned.content["images"]} == kept
    assert {a["image_id"] for a in cleaned.content["annotations"]} == kept


@pytest.mark.parametrize(
    "change, text",
    [
        (repeat("categories", name="dog"), "categories disc and dog have the same id 1"),
        (entry("categories", 0, name=""), "entry 0 of 'categories' has no 'name'"),
        (entry("categories", 0, id=None), "category disc has no valid 'id'"),
        (entry("categories", 1, name="disc"), "categories 1 and 2 have the same name disc"),
        (mixed_ids, "some ids of 'images' are numbers and others strings; use only numbers"),
        (lambda content: content.pop("images"), "'images' is missing or empty"),
        (lambda content: content.update(categories=[]), "'categories' is missing or empty"),
        (lambda content: content.update(annotations={}), "'annotations' must be a list"),
    ],
)
def test_invalid_structure_is_rejected_by_load_and_check(coco, change, text):
    change(coco.content)
    name = coco.register()
    for use in (load_dataset, inspect_dataset):
        with pytest.raises(InputError, match=f"{coco.json_file}: {text}"):
            use(name)


def test_number_of_problems_is_reported(coco):
    for annotation in coco.content["annotations"]:
        annotation["bbox"] = None
    with pytest.raises(InputError, match=r"annotation 101: .* \(3 problems; fcos-d2 .* lists them"):
        load_dataset(coco.register())


# ---- Image sizes ----


def resize_images(coco, size, **options):
    for number in (1, 2, 3):
        Image.new("RGB", size).save(coco.folder / f"{number}.png", **options)


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (60, 50)])
def test_size_is_read_from_the_image_if_the_boxes_fit(coco, size):
    resize_images(coco, size)
    found = inspect_dataset(coco.register())
    assert found.repaired == {"size": 3} and found.num_problems == 0
    assert [(r["width"], r["height"]) for r in found.records] == [size] * 3
    (cleaned,) = clean([found], [found])
    assert [(i["width"], i["height"]) for i in cleaned.content["images"]] == [size] * 3


@pytest.mark.parametrize(
    "size, text",
    [
        ((120, 80), "it has 120 x 80 pixels, but is annotated with 60 x 40: it was resized by 2 "),
        ((30, 20), "it was resized by 0.5 after annotation"),
        ((20, 60), "and the boxes do not fit; replace the image"),
    ],
)
def test_ambiguous_size_is_a_problem(coco, size, text):
    resize_images(coco, size)
    found = inspect_dataset(coco.register())
    assert len(found.image_problems) == 3 and text in found.image_problems[f"{coco.folder}/1.png"]


def test_boxes_drawn_on_stored_pixels_are_distinguished_from_a_swapped_size(coco):
    exif = Image.Exif()
    exif[274] = 6
    resize_images(coco, (60, 40), exif=exif)
    found = inspect_dataset(coco.register())
    (reason, *_) = found.image_problems.values()
    assert reason.startswith(
        "it has 40 x 60 pixels, but is annotated with 60 x 40, its size before the EXIF"
    )
    assert "set upright: false" in reason


# ---- Whole files ----


def test_boxes_written_as_corners_are_rejected_by_load_and_converted_by_clean(coco):
    corners = ([30, 20, 55, 35], [31, 5, 60, 30], [5, 6, 30, 20])
    for annotation, box in zip(coco.content["annotations"], corners, strict=True):
        annotation["bbox"] = box
    name = coco.register()
    with pytest.raises(InputError, match=r"fit the images only as \[x1, y1, x2, y2\]"):
        load_dataset(name)
    found = inspect_dataset(name)
    assert [problem.kind for problem in found.problems] == ["corners"]
    (cleaned,) = clean([found], [found])
    assert [a["bbox"] for a in cleaned.content["annotations"]] == [
        [30, 20, 25, 15], [31, 5, 29, 25], [5, 6, 25, 14],
    ]  # fmt: skip
    assert cleaned.repaired == {"corners": 3} and not cleaned.removed


def test_widths_and_heights_are_not_mistaken_for_corners():
    rng = np.random.default_rng(0)
    sizes = np.full((1000, 2), [60, 40])
    low, high = np.sort(rng.uniform(0, [60, 40], (2, 1000, 2)), axis=0)
    assert is_written_as_corners(np.hstack([low, high]), sizes)
    assert not is_written_as_corners(np.hstack([low, high - low]), sizes)
    assert not is_written_as_corners(np.zeros((0, 4)), np.zeros((0, 2)))


def all_annotations(**change):
    def apply(content):
        for annotation in content["annotations"]:
            annotation.update(change)

    return apply


@pytest.mark.parametrize(
    "change, text",
    [
        (all_annotations(iscrowd=1), "all 3 annotations are crowd regions"),
        (all_annotations(ignore=1), "all 3 annotations are crowd regions"),
        (all_annotations(bbox=[5, 6, 0, 10]), "all 3 boxes are outside their images or have zero"),
        (lambda content: content.update(annotations=[]), "there are no annotations"),
        (lambda content: content.pop("annotations"), "there are no annotations"),
    ],
)
def test_dataset_without_objects_reports_the_likely_reason(coco, change, text):
    change(coco.content)
    found = inspect_dataset(coco.register())
    assert found.num_problems == 0
    assert text in explain_missing_objects(found.records)


# ---- Records of dataset functions ----

VALID = {"bbox": [5, 6, 25, 16], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [25, 6, 5, 16]},
        {"bbox": np.array([1, 2, np.nan, 4])},
        {"bbox": ["5", 6, 25, 16]},
        {"bbox": None},
        {"category_id": 7},
        {"category_id": -1},
        {"bbox_mode": None},
        {"iscrowd": "maybe"},
    ],
    ids=str,
)
def test_invalid_record_is_reported_with_image_and_index(coco, change):
    record = {"file_name": str(coco.folder / "1.png"), "width": 60, "height": 40}
    record["annotations"] = [VALID, {**VALID, **change}]
    name = register_function(lambda: [record], thing_classes=["disc", "box"])
    expected = "'custom': annotation 1 of image .*1.png: bbox must be four finite numbers .*got"
    with pytest.raises(InputError, match=expected):
        load_dataset(name)
    found = inspect_dataset(name)
    assert len(found.problems) == 1 and found.records[0]["annotations"] == [VALID]
    assert list(clean([found], [found])) == []


def test_all_defects_are_tested():
    tested = {kind for _, repaired in REPAIRED for kind in repaired} | {k for _, k, _ in BROKEN}
    tested_separately = {"corners", "size", "image", "ignore", "mask"}
    assert tested | tested_separately == DEFECTS.keys()


def test_json_is_read_in_other_encodings(coco):
    coco.content["categories"][0]["name"] = "Würfel"
    text = json.dumps(coco.content, ensure_ascii=False)
    name = coco.register()
    for encode in (
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: gzip.compress(text.encode()),
    ):
        coco.json_file.write_bytes(encode(text))
        MetadataCatalog.get(name).__dict__.pop("thing_classes", None)
        assert len(load_dataset(name)) == 3 and class_names(name)[0] == "Würfel"
