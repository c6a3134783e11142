"""The table of defects, row by row: load, check and clean say and do the same about each."""

import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.defects import DEFECTS, is_written_as_corners
from fcos_d2.data.inspection import clean, inspect_dataset
from fcos_d2.data.records import why_nothing_is_learned
from fcos_d2.errors import InputError

BOX = [5, 6, 20, 10]  # of every annotation of the data


def annotate(**change):
    """Changes the annotation of image 2."""
    return lambda content: content["annotations"][1].update(change)


def entry(key, index, **change):
    return lambda content: content[key][index].update(change)


def again(key, **change):
    """Lists the first entry once more."""
    return lambda content: content[key].append({**content[key][0], **change})


def without(key, *fields):
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


def elsewhere(beginning, separator="/", end=""):
    def change(content):
        for image in content["images"]:
            image["file_name"] = f"{beginning}{separator}{image['file_name']}{end}"

    return change


# What is changed, the row of the table with its number, and the box of image 2 where it is another.
REPAIRED = [
    (annotate(bbox=[25, 16, -20, -10]), {"negative": 1}, BOX),
    (annotate(bbox=["5", " 6", "20.0", "10"]), {"number": 1}, BOX),
    (annotate(bbox=["5", 16, 20, "-10"]), {"number": 1, "negative": 1}, BOX),
    (masks_for_boxes, {"no box": 2}, BOX),
    (annotate(iscrowd="False"), {"flag": 1}, BOX),
    (annotate(iscrowd=None), {}, BOX),
    (without("annotations", "id"), {"id": 3}, BOX),
    (annotate(id=101), {"id": 1}, BOX),
    (annotate(id=[1]), {"id": 1}, BOX),
    (text_references, {"reference": 6}, BOX),
    (text_ids, {"reference": 3}, BOX),
    (again("annotations"), {"same annotation": 1}, BOX),
    (again("images"), {"same image": 1}, BOX),
    (again("categories", supercategory="shape"), {"same category": 1}, BOX),
    (entry("categories", 0, name=" disc\r\n"), {"class name": 1}, BOX),
    (entry("images", 1, width=60.0, height="40"), {"number": 1}, BOX),
    (entry("images", 1, width=None), {"no size": 1}, BOX),
    (entry("images", 1, height=-40, width="?"), {"no size": 1}, BOX),
    (without("images", "width", "height"), {"no size": 3}, BOX),
    (elsewhere("/data/upload/7"), {"path": 3}, BOX),
    (elsewhere("..\\media", "\\"), {"path": 3}, BOX),
]


@pytest.mark.parametrize("change, rows, box", REPAIRED)
def test_defect_with_one_meaning_is_repaired_wherever_data_is_read(coco, caplog, change, rows, box):
    change(coco.content)
    name = coco.register()
    with caplog.at_level(logging.WARNING, "fcos_d2"):
        records = load_dataset(name)
    assert [len(record["annotations"]) for record in records] == [1, 1, 1]
    assert records[1]["annotations"][0]["bbox"] == box
    assert [(record["width"], record["height"]) for record in records] == [(60, 40)] * 3
    assert class_names(name) == ["disc", "box"]
    for row, count in rows.items():
        assert f"{count} {DEFECTS[row].what}: {DEFECTS[row].repair}" in caplog.text
    found = inspect_dataset(name)
    assert found.num_problems == 0 and found.repaired == rows and found.records == records
    (cleaned,) = clean([found], [found])
    assert cleaned.num_before == 3 and not cleaned.removed
    coco.content = cleaned.content
    again = inspect_dataset(coco.register("cleaned"))
    assert not again.repaired and not again.problems
    boxes = [
        [a["bbox"] for r in rows for a in r["annotations"]] for rows in (records, again.records)
    ]
    assert boxes[0] == boxes[1]


# What is changed, its row, and what is said; all but the annotation of image 2 is kept.
BROKEN = [
    (annotate(bbox=None), "box", "annotation 102: bbox is missing"),
    (
        annotate(bbox=[1, 2, 3]),
        "box",
        r"bbox must be \[x, y, width, height\] in numbers, got \[1, 2",
    ),
    (annotate(bbox=[1, 2, "x", 4]), "box", r"in numbers, got \[1, 2, 'x', 4\]"),
    (annotate(bbox=[1, 2, float("nan"), 4]), "box", "bbox must be finite, got .*; remove it"),
    (annotate(bbox=["inf", 2, 3, 4]), "box", "bbox must be finite"),
    (
        annotate(bbox=[1, 2, -9, 4]),
        "box",
        r"bbox \[1, 2, -9, 4\] has a negative size",
    ),
    (annotate(bbox=None, segmentation=[[1, 2, 3, 4]]), "box", "bbox is missing"),
    (annotate(category_id=9), "category_id", r"category_id 9 is not an id in the file \(1, 2\)"),
    (annotate(image_id=77), "image_id", r"image_id 77 is not an id in the file \(1, 2, 3\)"),
    (annotate(image_id=[2]), "image_id", r"image_id \[2\] is not an id in the file"),
    (annotate(iscrowd=[]), "iscrowd", r"iscrowd must be 0 or 1, got \[\]"),
    (lambda content: content["annotations"][1].pop("image_id"), "entry", "'image_id' is missing"),
    (lambda c: c["annotations"][1].pop("category_id"), "entry", "'category_id' is missing"),
]


@pytest.mark.parametrize("change, row, text", BROKEN)
def test_defect_with_several_meanings_stops_and_is_listed_and_left_out(coco, change, row, text):
    change(coco.content)
    name = coco.register()
    with pytest.raises(InputError, match=f"{coco.json_file}: annotation 102: .*") as caught:
        load_dataset(name)
    assert caught.match(text) and "\n" not in str(caught.value)
    found = inspect_dataset(name)
    assert [problem.kind for problem in found.problems] == [row]
    assert [len(record["annotations"]) for record in found.records] == [1, 0, 1]
    (cleaned,) = clean([found], [found])
    assert [a["id"] for a in cleaned.content["annotations"]] == [101, 103]
    assert cleaned.removed == [f"1 {DEFECTS[row].what}"] and cleaned.num_before == 3


@pytest.mark.parametrize(
    "change, text",
    [
        (again("images", width=61), "two different images have the id 1; renumber them"),
        (entry("images", 1, file_name=None), "image 2 has no 'file_name'"),
        (lambda content: content["images"][1].pop("id"), "entry 1 of 'images' has no valid 'id'"),
        (lambda content: content["images"].append(3), "entry 3 of 'images' is not an object"),
    ],
)
def test_image_entry_that_makes_no_sense_is_named_with_what_belongs_to_it(coco, change, text):
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
        (again("categories", name="dog"), "categories disc and dog have the same id 1"),
        (entry("categories", 0, name=""), "entry 0 of 'categories' has no 'name'"),
        (entry("categories", 0, id=None), "category disc has no valid 'id'"),
        (
            entry("categories", 1, name="disc"),
            "categories 1 and 2 have the same name disc",
        ),
        (mixed_ids, "some ids of 'images' are numbers and others strings; renumber them"),
        (lambda content: content.pop("images"), "it has no 'images'"),
        (lambda content: content.update(categories=[]), "it has no 'categories'"),
        (lambda content: content.update(annotations={}), "'annotations' must be a list"),
    ],
)
def test_structure_is_checked_on_every_load(coco, change, text):
    change(coco.content)
    name = coco.register()
    for use in (load_dataset, inspect_dataset):
        with pytest.raises(InputError, match=f"{coco.json_file}: {text}"):
            use(name)


def test_number_of_problems_is_told(coco):
    for annotation in coco.content["annotations"]:
        annotation["bbox"] = None
    with pytest.raises(InputError, match=r"annotation 101: .* \(3 problems; fcos-d2 .* lists them"):
        load_dataset(coco.register())


# ---- sizes of images ----


def resized(coco, size, **options):
    for number in (1, 2, 3):
        Image.new("RGB", size).save(coco.folder / f"{number}.png", **options)


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (60, 50)])
def test_size_is_that_of_the_image_where_the_boxes_fit_it(coco, size):
    resized(coco, size)
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
def test_size_that_could_mean_several_things_is_a_problem(coco, size, text):
    resized(coco, size)
    found = inspect_dataset(coco.register())
    assert len(found.image_problems) == 3 and text in found.image_problems[f"{coco.folder}/1.png"]


def test_boxes_drawn_on_stored_pixels_are_told_from_a_swap(coco):
    exif = Image.Exif()
    exif[274] = 6
    resized(coco, (60, 40), exif=exif)
    found = inspect_dataset(coco.register())
    (reason, *_) = found.image_problems.values()
    assert reason.startswith(
        "it has 40 x 60 pixels, but is annotated with 60 x 40, its size before the EXIF"
    )
    assert "set upright: false" in reason


# ---- whole files ----


def corners(content):
    boxes = ([30, 20, 55, 35], [31, 5, 60, 30], [5, 6, 30, 20])
    for annotation, box in zip(content["annotations"], boxes, strict=True):
        annotation["bbox"] = box


def test_boxes_written_as_corners_stop_and_are_cleaned(coco):
    corners(coco.content)
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


def test_real_widths_are_not_taken_for_corners():
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
        (all_annotations(bbox=[5, 6, 0, 10]), "all 3 boxes are outside their images or have no"),
        (lambda content: content.update(annotations=[]), "there are no annotations"),
        (lambda content: content.pop("annotations"), "there are no annotations"),
    ],
)
def test_data_that_teaches_nothing_has_a_likely_cause(coco, change, text):
    change(coco.content)
    found = inspect_dataset(coco.register())
    assert found.num_problems == 0
    assert text in why_nothing_is_learned(found.records)


# ---- records of somebody's own function ----

OWN = {"bbox": [5, 6, 25, 16], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}


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
def test_broken_record_is_named_by_image_and_index(coco, change):
    record = {"file_name": str(coco.folder / "1.png"), "width": 60, "height": 40}
    record["annotations"] = [OWN, {**OWN, **change}]
    DatasetCatalog.register("own", lambda: [record])
    MetadataCatalog.get("own").thing_classes = ["disc", "box"]
    expected = (
        "dataset 'own': annotation 1 of image .*1.png: bbox must be four finite numbers .*got"
    )
    with pytest.raises(InputError, match=expected):
        load_dataset("own")
    found = inspect_dataset("own")
    assert len(found.problems) == 1 and found.records[0]["annotations"] == [OWN]
    assert list(clean([found], [found])) == []


def test_every_row_of_the_table_has_a_test():
    tested = {row for _, rows, _ in REPAIRED for row in rows} | {row for _, row, _ in BROKEN}
    elsewhere = {"corners", "size", "image", "ignore", "mask"}
    assert tested | elsewhere == DEFECTS.keys()


def test_json_of_another_encoding_is_read(coco):
    import gzip

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
