"""Tests the HTML report of an evaluation."""

import html
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.evaluation import Objects, evaluate_boxes, ground_truth
from fcos_d2.evaluation.report import box_ious, false_negatives, false_positives, write_report

NAMES = ["disc", "box & <co>", "never"]
A, NEAR_A, POOR_A, B, FAR = (
    [10, 10, 50, 50], [12, 12, 50, 50], [30, 10, 70, 50], [80, 60, 120, 90], [2, 90, 20, 110]
)  # fmt: skip


def record(path, *objects) -> dict:
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c} for box, c in objects
    ]
    return {"file_name": str(path), "annotations": annotations}


def detections(*found) -> Objects:
    boxes, classes, scores = zip(*found, strict=True) if found else ((), (), ())
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Objects(boxes, np.array(classes, int), np.array(scores, float))


def mistakes(truth, found):
    truth = [ground_truth(record("", *truth))]
    matches = evaluate_boxes(truth, [found], 3).images
    return (
        false_positives(truth, [found], matches, NAMES),
        false_negatives(truth, [found], [found], matches, NAMES),
    )


def test_false_positives_have_kinds_and_are_sorted_by_score():
    found = detections((A, 0, 0.9), (NEAR_A, 0, 0.6), (POOR_A, 0, 0.5), (B, 0, 0.8), (FAR, 1, 0.7))
    false, missed = mistakes([(A, 0), (B, 1)], found)
    assert [(m.score, m.kind) for m in false] == [
        (0.8, "wrong class"),
        (0.7, "background"),
        (0.6, "duplicate"),
        (0.5, "poor box"),
    ]
    assert false[0].detail == f"the object is {NAMES[1]}" and false[3].detail == "IoU 0.33"
    (miss,) = missed
    assert miss.kind == "wrong class" and miss.detail == "detected as disc 0.80"


def test_false_negatives_have_kinds_and_are_sorted_by_area():
    truth = [ground_truth(record("", (FAR, 2), (A, 0), (B, 1)))]
    found = [detections((POOR_A, 0, 0.4), (B, 1, 0.2))]
    kept = [detections()]
    matches = evaluate_boxes(truth, kept, 3).images
    missed = false_negatives(truth, kept, found, matches, NAMES)
    assert [(m.kind, m.detail) for m in missed] == [
        ("poor box", "IoU 0.33"),
        ("low score", "score 0.20"),
        ("missed", "no detection of this class"),
    ]
    assert all(m.score is None for m in missed)


def test_box_ious_by_hand():
    ious = box_ious(np.array([0, 0, 2, 2]), [[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]])
    assert ious == pytest.approx([1, 1 / 3, 0])
    assert box_ious(np.array([1, 1, 1, 1]), [[1, 1, 1, 1]]) == [0]


class Page(NamedTuple):
    """The text of a page, the images in it, and the classes of its figures."""

    text: str
    sources: list[str]
    classes: list[str]


@pytest.fixture
def page(tmp_path):
    records = []
    for number, objects in enumerate([[(A, 0), (B, 1)], [(A, 1)], []]):
        path = tmp_path / f"<{number}>.png"
        Image.new("RGB", (128, 112), (120, 120, 120)).save(path)
        records.append(record(path, *objects))
    found = [
        detections((A, 0, 0.9), (FAR, 0, 0.95)),
        detections((NEAR_A, 1, 0.8), (B, 1, 0.9)),
        detections(),
    ]

    def write(found=found, **options) -> Page:
        path = write_report(tmp_path / "report", "R & D", records, found, NAMES, **options)
        text = path.read_text()
        classes = re.findall(r'data-class="([^"]*)"', text)
        return Page(text, re.findall(r'src="([^"]*)"', text), list(map(html.unescape, classes)))

    return write


def test_page_uses_only_files_of_its_folder(page, tmp_path):
    shown = page()
    assert len(shown.sources) > 3
    for source in shown.sources:
        assert not re.match(r"\w+:|/", source)
        assert Image.open(tmp_path / "report" / source).size[0] > 100
    assert "http" not in shown.text
    assert set(shown.classes) == {"disc", NAMES[1]}


def test_names_are_escaped(page):
    text = page().text
    assert "<co>" not in text and "box &amp; &lt;co&gt;" in text and "R &amp; D" in text
    assert "&lt;0&gt;.png" in text


def test_number_of_mistakes_is_limited_and_old_images_are_deleted(page, tmp_path):
    many = page()
    few = page(max_mistakes=1)
    images = list(Path(tmp_path, "report", "images").iterdir())
    assert len(many.classes) > len(few.classes) == 2 == len(images)


@pytest.mark.parametrize("kind", ["positives", "negatives"])
def test_mistake_is_drawn_in_red(page, tmp_path, kind):
    page()
    image = np.asarray(Image.open(tmp_path / f"report/images/false_{kind}_000.jpg")).astype(int)
    assert (abs(image - (213, 0, 0)).sum(-1) < 60).sum() > 50


def test_page_without_detections_lists_all_objects_as_missed(page):
    shown = page([detections()] * 3)
    assert "missed 3" in shown.text and "0 in all" in shown.text
