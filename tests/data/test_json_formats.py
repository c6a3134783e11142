"""Tests JSON files of LabelMe, VIA, Label Studio and CreateML."""

import re
from pathlib import Path

import pytest

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.inspection import clean, inspect_dataset
from fcos_d2.errors import InputError

from .two_images import HEIGHT, OBJECTS, WIDTH, assert_recognized, assert_same, write


def labelme_file(file, *shapes):
    content = {"imagePath": f"..\\images\\{file}", "imageWidth": WIDTH, "imageHeight": HEIGHT}
    return {**content, "shapes": list(shapes)}


def labelme(root):
    for file, objects in OBJECTS.items():
        shapes = [
            {"label": label, "points": [[x + w, y], [x, y + h]], "shape_type": "rectangle"}
            for label, x, y, w, h in objects
        ]
        write(root / "labels" / f"{Path(file).stem}.json", labelme_file(file, *shapes))
    (root / "labels" / "._a.json").write_bytes(b"\0hidden")
    return str(root / "labels")


def via(root, regions=lambda items: items):
    content = {}
    for file, objects in OBJECTS.items():
        items = [
            {
                "shape_attributes": {"name": "rect", "x": x, "y": y, "width": w, "height": h},
                "region_attributes": {"color": "red", "Type": label},
            }
            for label, x, y, w, h in objects
        ]
        content[f"{file}123"] = {"filename": file, "size": 123, "regions": regions(items)}
    return content


def via_project(root):
    return write(root / "via.json", {"_via_settings": {}, "_via_img_metadata": via(root)})


def via_annotations(root):
    """Writes the older export: regions by number, without the project settings."""
    content = via(root, lambda items: {str(i): item for i, item in enumerate(items)})
    return write(root / "via.json", content)


LABEL_STUDIO_SIZE = {"original_width": WIDTH, "original_height": HEIGHT}


def percent(label, x, y, w, h):
    box = {"x": x / WIDTH, "y": y / HEIGHT, "width": w / WIDTH, "height": h / HEIGHT}
    return {**{key: 100 * value for key, value in box.items()}, "rectanglelabels": [label]}


def label_studio(root):
    tasks = []
    for file, objects in OBJECTS.items():
        result = [{"value": percent(*item), **LABEL_STUDIO_SIZE} for item in objects]
        result.append({"type": "choices", "value": {}})
        annotations = [{"was_cancelled": True, "result": []}, {"result": result}]
        data = {"image": f"/data/upload/4/0a1b2c3d-{file}"}
        tasks.append({"id": 1, "data": data, "annotations": annotations})
    return write(root / "tasks.json", tasks)


def label_studio_minimal(root):
    tasks = [
        {
            "image": f"/data/local-files/?d=images/{file}",
            "annotation_id": 7,
            "label": [{**percent(*item), **LABEL_STUDIO_SIZE} for item in objects],
        }
        for file, objects in OBJECTS.items()
    ]
    return write(root / "tasks.json", tasks)


def createml(root):
    content = []
    for file, objects in OBJECTS.items():
        boxes = [
            {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h} for _, x, y, w, h in objects
        ]
        labels = [label for label, *_ in objects]
        items = [{"label": n, "coordinates": b} for n, b in zip(labels, boxes, strict=True)]
        content.append({"image": file, "annotations": items})
    return write(root / "_annotations.createml.json", content)


JSON = [labelme, via_project, via_annotations, label_studio, label_studio_minimal, createml]


@pytest.mark.parametrize("make", JSON)
def test_json_formats_are_detected_by_content(register, root, make):
    register(mine={"json": make(root), "images": str(root / "images")})
    assert class_names("mine") == ["bird", "cat & co", "dog"]
    assert_same("mine")
    assert inspect_dataset("mine").num_problems == 0
    assert_recognized(register, root, all=OBJECTS)


@pytest.mark.parametrize("make", JSON)
def test_invalid_shape_is_listed_and_cleaned(register, root, make):
    path = Path(make(root))
    file = path / "a.json" if path.is_dir() else path
    # Replaces one number of the second object of a.jpg.
    file.write_text(re.sub(r'("x": |\[)(4|8\.0|17\.0|30)\b', r'\1"?"', file.read_text(), count=1))
    register(mine={"json": str(path), "images": str(root / "images")})
    found = inspect_dataset("mine")
    (problem,) = found.problems
    assert problem.text.startswith("annotation 1 of ") and "a.j" in problem.text
    (cleaned,) = clean([found], [found])
    write(root / "clean.json", cleaned.content)
    register(clean={"json": str(root / "clean.json"), "images": str(root / "images")})
    assert_same("clean", {**OBJECTS, "a.jpg": OBJECTS["a.jpg"][:1]})


def in_labelme(**shape):
    return labelme_file("a.jpg", {"label": "dog", **shape})


def in_via(**shape):
    region = {"shape_attributes": shape, "region_attributes": {"type": {"cat": False, "dog": True}}}
    return {"a": {"filename": "a.jpg", "regions": [region]}}


def in_label_studio(**value):
    shape = {"value": {**value, "labels": ["dog"]}, **LABEL_STUDIO_SIZE}
    return [{"data": {"img": "a.jpg"}, "annotations": [{"result": [shape]}]}]


@pytest.mark.parametrize(
    "content, box",
    [
        (in_labelme(shape_type="circle", points=[[20, 20], [23, 24]]), (15, 15, 10, 10)),
        (in_labelme(shape_type="polygon", points=[[5, 6], [25, 6], [9, 16]]), (5, 6, 20, 10)),
        (in_labelme(shape_type="line", points=[[5, 6], [25, 16]]), (5, 6, 20, 10)),
        (in_via(name="circle", cx=20, cy=20, r=5), (15, 15, 10, 10)),
        (in_via(name="ellipse", cx=20, cy=20, rx=5, ry=3), (15, 17, 10, 6)),
        (in_via(name="point", cx=20, cy=20), (20, 20, 0, 0)),
        (in_via(name="polygon", all_points_x=[5, 25, 9], all_points_y=[6, 6, 16]), (5, 6, 20, 10)),
        (in_label_studio(x=20, y=10, width=40, height=20, rotation=90), (-2, 6, 12, 20)),
        (in_label_studio(points=[[10, 10], [50, 10], [18, 26.6667]]), (5, 6, 20, 10)),
        (in_label_studio(x=40, y=50, radiusX=10, radiusY=5), (15, 27, 10, 6)),
    ],
)
def test_shapes_become_boxes(register, root, content, box):
    register(mine={"json": write(root / "x.json", content), "images": str(root / "images")})
    assert_same("mine", {"a.jpg": [("dog", *box)]})


def test_via_regions_without_attributes_are_objects(register, root):
    content = in_via(name="point", cx=20, cy=20)
    del content["a"]["regions"][0]["region_attributes"]
    register(mine={"json": write(root / "via.json", content), "images": str(root / "images")})
    assert class_names("mine") == ["object"]


@pytest.mark.parametrize(
    "content, kind",
    [
        ([{"image_id": 1, "category_id": 1, "score": 0.5}], "COCO's format of detections"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ({"one": 1, "two": 2}, "JSON with the keys one, two, in an unknown format"),
        ([{"one": 1}], "a JSON list of objects with the keys one, in an unknown format"),
        ([], "JSON of type list, in an unknown format"),
    ],
)
def test_unknown_json_is_rejected_with_its_content(register, root, content, kind):
    register(mine={"json": write(root / "x.json", content), "images": str(root / "images")})
    with pytest.raises(InputError, match=rf"x.json is {kind}.*; export the annotations as COCO"):
        load_dataset("mine")
