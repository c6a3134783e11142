"""Annotation files of other tools: the same boxes and classes, whatever they are written in."""

import json
import re
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from PIL import Image

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.inspection import clean, inspect_dataset
from fcos_d2.errors import InputError

# Two images of 50 x 60 and their boxes: class, then x, y, width and height.
OBJECTS = {"a.jpg": [("dog", 0, 0, 10, 20), ("cat & co", 4, 5, 26, 35)], "b.png": []}
OBJECTS["b.png"] = [("bird", 1, 2, 3, 4)]
WIDTH, HEIGHT = 50, 60


@pytest.fixture
def root(tmp_path):
    """A folder with the two images in ``images``."""
    (tmp_path / "images").mkdir()
    for name in OBJECTS:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / name)
    return tmp_path


def boxes(name) -> dict[str, list]:
    """Class and box of every object, by the name of the image's file."""
    names = class_names(name)
    return {
        Path(record["file_name"]).name: [
            (names[a["category_id"]], *a["bbox"]) for a in record["annotations"]
        ]
        for record in load_dataset(name, filter_empty=False)
    }


def assert_same(name, expected=OBJECTS):
    found = boxes(name)
    assert found.keys() == expected.keys()
    for file, objects in expected.items():
        assert [item[0] for item in found[file]] == [item[0] for item in objects]
        for ours, theirs in zip(found[file], objects, strict=True):
            assert ours[1:] == pytest.approx(theirs[1:], abs=1e-3)


# ---- JSON ----


def write(path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


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
    """The older export: regions by their numbers, and nothing around."""
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
        done = [{"was_cancelled": True, "result": []}, {"result": result}]
        data = {"image": f"/data/upload/4/0a1b2c3d-{file}"}
        tasks.append({"id": 1, "data": data, "annotations": done})
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
def test_json_of_annotation_tools_is_told_by_its_content(described, root, make):
    described(mine={"json": make(root), "images": str(root / "images")})
    assert class_names("mine") == ["bird", "cat & co", "dog"]
    assert_same("mine")
    assert inspect_dataset("mine").num_problems == 0


@pytest.mark.parametrize("make", JSON)
def test_what_is_broken_in_them_is_listed_and_cleaned(described, root, make):
    path = Path(make(root))
    file = path / "a.json" if path.is_dir() else path
    # One number of the second object of a.jpg.
    file.write_text(re.sub(r'("x": |\[)(4|8\.0|17\.0|30)\b', r'\1"?"', file.read_text(), count=1))
    described(mine={"json": str(path), "images": str(root / "images")})
    found = inspect_dataset("mine")
    (problem,) = found.problems
    assert problem.text.startswith("annotation 1 of ") and "a.j" in problem.text
    (cleaned,) = clean([found], [found])
    write(root / "clean.json", cleaned.content)
    described(clean={"json": str(root / "clean.json"), "images": str(root / "images")})
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
        (
            in_via(name="polygon", all_points_x=[5, 25, 9], all_points_y=[6, 6, 16]),
            (5, 6, 20, 10),
        ),
        (in_label_studio(x=20, y=10, width=40, height=20, rotation=90), (-2, 6, 12, 20)),
        (in_label_studio(points=[[10, 10], [50, 10], [18, 26.6667]]), (5, 6, 20, 10)),
        (in_label_studio(x=40, y=50, radiusX=10, radiusY=5), (15, 27, 10, 6)),
    ],
)
def test_shapes_have_boxes(described, root, content, box):
    described(mine={"json": write(root / "x.json", content), "images": str(root / "images")})
    assert_same("mine", {"a.jpg": [("dog", *box)]})


def test_via_regions_without_attributes_are_objects(described, root):
    content = in_via(name="point", cx=20, cy=20)
    del content["a"]["regions"][0]["region_attributes"]
    described(mine={"json": write(root / "via.json", content), "images": str(root / "images")})
    assert class_names("mine") == ["object"]


@pytest.mark.parametrize(
    "content, kind",
    [
        ([{"image_id": 1, "category_id": 1, "score": 0.5}], "COCO's format of detections"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ({"one": 1, "two": 2}, "JSON with the keys one, two, which no format has"),
        ([{"one": 1}], "a JSON list of objects with the keys one, which no format has"),
        ([], "JSON of type list, which no format has"),
    ],
)
def test_unknown_file_names_what_it_looks_like(described, root, content, kind):
    described(mine={"json": write(root / "x.json", content), "images": str(root / "images")})
    with pytest.raises(InputError, match=rf"x.json is {kind}.*; export the annotations as COCO"):
        load_dataset("mine")


# ---- Pascal VOC ----

VOC = ("Annotations", "ImageSets/Main", "JPEGImages")


def voc_text(file, objects, head="") -> str:
    items = "".join(
        f"<object><name>{escape(label)}</name><difficult>{int(label == 'cat & co')}</difficult>"
        f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        "</bndbox></object>"
        for label, x, y, w, h in objects
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return f"{head}<annotation><filename>{file}</filename>{size}{items}</annotation>"


@pytest.fixture
def voc(root):
    """The folders of a VOC dataset; its splits are "train" with both images and "val" with one."""
    for folder in VOC[:2]:
        (root / folder).mkdir(parents=True)
    (root / "images").rename(root / "JPEGImages")
    for file, objects in OBJECTS.items():
        (root / "Annotations" / f"{Path(file).stem}.xml").write_text(voc_text(file, objects))
    (root / "ImageSets/Main/train.txt").write_text("a  1\nb -1\n\n")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    return root


def test_voc_counts_pixels_from_zero_and_knows_the_classes_of_all_splits(described, voc):
    described(pets={"voc": str(voc), "split": "train"}, few={"voc": str(voc), "split": "val"})
    assert class_names("pets") == class_names("few") == ["bird", "cat & co", "dog"]
    assert_same("pets")
    assert_same("few", {"b.png": OBJECTS["b.png"]})
    crowds = [a["iscrowd"] for record in load_dataset("pets") for a in record["annotations"]]
    assert crowds == [0, 1, 0]


def test_voc_classes_can_be_given_in_an_order(described, voc):
    described(pets={"voc": str(voc), "split": "train", "classes": ["dog", "bird"]})
    assert_same("pets", {"a.jpg": OBJECTS["a.jpg"][:1], "b.png": OBJECTS["b.png"]})


def beside(voc):
    for path in (voc / "JPEGImages").iterdir():
        path.rename(voc / "Annotations" / path.name)
    return {"voc": str(voc / "Annotations")}


def lower_case(voc):
    (voc / "Annotations").rename(voc / "annotations")
    (voc / "JPEGImages").rename(voc / "images")
    shutil.rmtree(voc / "ImageSets")
    return {"voc": str(voc)}


def apart(voc):
    return {"voc": {"xml": str(voc / "Annotations"), "images": str(voc / "JPEGImages")}}


def images_and_xml_in_images(voc):
    beside(voc)
    (voc / "Annotations").rename(voc / "images")
    (voc / "JPEGImages").rmdir()
    return {"voc": str(voc)}


@pytest.mark.parametrize("layout", [beside, lower_case, apart, images_and_xml_in_images])
def test_voc_layouts_that_people_have(described, voc, layout):
    entry = layout(voc)
    described(pets=entry, part={**entry, "part": [0, 1]})
    assert_same("pets")
    assert_same("part")


LINES = ("my photo 1", '"my photo 1"', "my photo 1.jpg", "\ufeffmy photo 1", "my photo 1  -1")
LINES += ("JPEGImages/my photo 1.jpg", "images\\my photo 1.JPG", "  my photo 1.xml \r")


@pytest.mark.parametrize("line", LINES)
def test_lines_of_voc_lists(described, voc, line):
    for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (voc / folder / f"a.{suffix}").rename(voc / folder / f"my photo 1.{suffix}")
    (voc / "ImageSets/Main/train.txt").write_text(f"{line}\nb\n", encoding="utf-8")
    described(pets={"voc": str(voc), "split": "train"})
    assert boxes("pets").keys() == {"my photo 1.jpg", "b.png"}


def test_voc_list_can_lie_anywhere(described, voc):
    (voc / "mine.txt").write_text("b")
    described(pets={"voc": str(voc), "split": str(voc / "mine.txt")})
    assert_same("pets", {"b.png": OBJECTS["b.png"]})


def test_listed_image_without_xml_is_a_background(described, voc):
    (voc / "Annotations" / "b.xml").unlink()
    described(pets={"voc": str(voc), "split": "train"})
    assert_same("pets", {**OBJECTS, "b.png": []})


def test_voc_files_that_no_split_lists_stop_nothing(described, voc):
    (voc / "Annotations" / "._a.xml").write_bytes(b"\0hidden")
    (voc / "Annotations" / "c.xml").write_text("<annotation>")
    (voc / "JPEGImages" / "a.txt").write_text("no image")
    described(pets={"voc": str(voc), "split": "train"})
    assert_same("pets")


def test_all_that_is_broken_in_voc_is_listed_at_once_and_cleaned(described, voc):
    spoil(voc / "Annotations/a.xml", "<xmin>1</xmin>", "<xmin>x</xmin>")
    (voc / "Annotations/c.xml").write_text("<annotation>")
    (voc / "Annotations/d.xml").write_text("")
    (voc / "ImageSets/Main/train.txt").write_text("a\nb\nc\nd\nnone")
    (voc / "JPEGImages/b.png").write_bytes((voc / "JPEGImages/b.png").read_bytes()[:60])
    described(pets={"voc": str(voc), "split": "train"})
    found = inspect_dataset("pets")
    starts = [f"cannot read annotation file .*{file}.xml" for file in "cd"]
    starts += [
        "image none: neither an image nor an XML file",
        r"annotation 0 of a.xml: bbox must be .* got \['x', 1.0",
    ]
    for start in starts:
        assert any(re.match(start, problem.text) for problem in found.problems), start
    assert len(found.problems) == 4 and len(found.image_problems) == 1
    (cleaned,) = clean([found], [found])
    assert cleaned.file == str(voc / "train")
    path = write(voc / "train_clean.json", cleaned.content)
    described(clean={"json": path, "images": str(voc / "JPEGImages")})
    assert_same("clean", {"a.jpg": OBJECTS["a.jpg"][1:]})


def spoil(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "old, new, row",
    [
        ("<xmin>2</xmin>", "<xmin>6</xmin>", "negative"),
        ("<width>50</width>", "<width>0</width>", "no size"),
        ("<width>50</width>", "", "no size"),
        ("<width>50<", "<width>60<", "size"),
    ],
)
def test_defects_of_voc_with_one_meaning_are_repaired(described, voc, old, new, row):
    spoil(voc / "Annotations" / "b.xml", old, new)
    described(pets={"voc": str(voc), "split": "train"})
    found = inspect_dataset("pets")
    assert found.repaired == {row: 1} and found.num_problems == 0


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("<name>bird</name>", "", "annotation 0 of b.xml: it has no class name"),
        ("<name>bird</name>", "<name> </name>", "annotation 0 of b.xml: it has no class name"),
        ("<xmin>2</xmin>", "", r"annotation 0 of b.xml: bbox must be .* got \['', 3.0"),
        ("<xmin>2</xmin>", "<xmin>99</xmin>", "annotation 0 of b.xml: bbox .* has a negative size"),
    ],
)
def test_defects_of_voc_with_several_meanings_are_named(described, voc, old, new, text):
    spoil(voc / "Annotations" / "b.xml", old, new)
    described(pets={"voc": str(voc), "split": "train"})
    with pytest.raises(InputError, match=text):
        load_dataset("pets")


@pytest.mark.parametrize("encoding", ["GBK", "ISO-8859-1", "UTF-16", "utf-8", "windows-1252"])
def test_xml_is_read_in_the_encoding_that_it_declares(described, voc, encoding):
    name = "猫" if encoding in ("GBK", "UTF-16") else "Käfer"
    head = f'<?xml version="1.0" encoding="{encoding}"?>\n'
    text = voc_text("b.png", [(name, 1, 2, 3, 4)], head)
    (voc / "Annotations" / "b.xml").write_bytes(text.encode(encoding))
    described(pets={"voc": str(voc), "split": "val"})
    assert_same("pets", {"b.png": [(name, 1, 2, 3, 4)]})


@pytest.mark.parametrize(
    "entry, text",
    [
        ({"split": "test"}, "cannot read .*test.txt: no such file"),
        ({"voc": "none"}, "folder none does not exist"),
        (
            {"voc": {"xml": "JPEGImages", "images": "JPEGImages"}},
            "JPEGImages contains no XML files",
        ),
        ({"split": "empty"}, "empty.txt lists no images"),
    ],
)
def test_voc_that_is_not_there_is_named(described, voc, monkeypatch, entry, text):
    monkeypatch.chdir(voc)
    (voc / "ImageSets/Main/empty.txt").write_text("\n")
    described(pets={"voc": str(voc), **entry})
    with pytest.raises(InputError, match=f"dataset 'pets': .*{text}"):
        load_dataset("pets")


# ---- CVAT ----


def cvat(root, items) -> str:
    labels = "".join(
        f"<label><name>{name}</name></label>" for name in ("dog", "cat &amp; co", "bird")
    )
    images = "".join(
        f'<image id="{i}" name="{file}" width="{WIDTH}" height="{HEIGHT}">{shapes}</image>'
        for i, (file, shapes) in enumerate(items.items())
    )
    path = root / "annotations.xml"
    path.write_text(
        f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task>'
        f"<labels>{labels}</labels></task></meta>{images}</annotations>"
    )
    return str(path)


def test_cvat_has_its_classes_in_the_tasks_order(described, root):
    items = {
        file: "".join(
            f'<box label="{escape(label)}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
            for label, x, y, w, h in objects
        )
        for file, objects in OBJECTS.items()
    }
    described(mine={"cvat": cvat(root, items), "images": str(root / "images")})
    assert class_names("mine") == ["dog", "cat & co", "bird"]
    assert_same("mine")


@pytest.mark.parametrize(
    "shape, box",
    [
        ('<box label="dog" xtl="10" ytl="20" xbr="30" ybr="30" rotation="90"/>', (15, 15, 10, 20)),
        ('<polygon label="dog" points="5,6;25,6;9,16"/>', (5, 6, 20, 10)),
        ('<ellipse label="dog" cx="20" cy="20" rx="5" ry="3"/>', (15, 17, 10, 6)),
        ('<mask label="dog" left="5" top="6" width="20" height="10" rle="1, 2"/>', (5, 6, 20, 10)),
        ('<tag label="dog"/><points label="dog" points="5,6"/>', (5, 6, 0, 0)),
    ],
)
def test_cvat_shapes_have_boxes(described, root, shape, box):
    described(mine={"cvat": cvat(root, {"a.jpg": shape}), "images": str(root / "images")})
    assert_same("mine", {"a.jpg": [("dog", *box)]})


def test_broken_cvat_shape_is_listed_and_a_video_refused(described, root):
    items = {"a.jpg": '<box label="dog" xtl="?"/><cuboid label="dog"/>', "b.png": ""}
    described(mine={"cvat": cvat(root, items), "images": str(root / "images")})
    texts = [problem.text for problem in inspect_dataset("mine").problems]
    assert texts[0].startswith("annotation 0 of a.jpg: {") and texts[1].startswith("annotation 1 ")
    assert "'xtl': '?'" in texts[0] and texts[0].endswith("is not a shape with a box")
    (root / "annotations.xml").write_text("<annotations><track/></annotations>")
    described(mine={"cvat": str(root / "annotations.xml"), "images": str(root / "images")})
    with pytest.raises(InputError, match="tracks of a video; export the task as 'CVAT for images'"):
        load_dataset("mine")


# ---- YOLO ----

NAMES = ["dog", "cat & co", "bird"]


def yolo_line(label, x, y, w, h) -> str:
    values = ((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT)
    return " ".join([str(NAMES.index(label)), *(f"{value:.8f}" for value in values)])


@pytest.fixture
def yolo(root):
    """images/train with both images, images/val with a copy of one of them."""
    (root / "images").rename(root / "all")
    for split, files in (("train", ("a.jpg", "b.png")), ("val", ("b.png",))):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for file in files:
            shutil.copy(root / "all" / file, root / "images" / split / file)
            lines = "\n".join(yolo_line(*item) for item in OBJECTS[file])
            (root / "labels" / split / f"{Path(file).stem}.txt").write_text(f"{lines}\n\n")
    shutil.rmtree(root / "all")
    return root


def data_yaml(root, text) -> dict:
    (root / "data.yaml").write_text(text)
    return {"yolo": str(root / "data.yaml")}


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train\nval: images/val\nnames: [dog, cat & co, bird]",
        "path: .\ntrain: [images/train]\nval: images/val\nnames: {0: dog, 1: cat & co, 2: bird}",
        "train: ../images/train\nvalid: ../images/val\nnc: 3\nnames: ['dog', 'cat & co', 'bird']",
        "train: train.txt\nval: images\\val\nnames: [dog, cat & co, bird]",
    ],
    ids=["plain", "numbered names", "Roboflow", "list of images"],
)
def test_yolo_splits(described, yolo, text):
    (yolo / "train.txt").write_text("./images/train/a.jpg\nimages/train/b.png\n")
    entry = data_yaml(yolo, text)
    described(train={**entry, "split": "train"}, val={**entry, "split": "val"})
    assert class_names("train") == class_names("val") == NAMES
    assert_same("train")
    assert_same("val", {"b.png": OBJECTS["b.png"]})


def test_roboflow_folders_of_yolo(described, yolo):
    for folder in ("images", "labels"):
        (yolo / "train").mkdir(exist_ok=True)
        (yolo / folder / "train").rename(yolo / "train" / folder)
    entry = data_yaml(yolo, "train: ../train/images\nnames: [dog, cat & co, bird]")
    described(train={**entry, "split": "train"})
    assert_same("train")


def test_yolo_without_a_yaml_has_its_labels_beside_the_images(described, yolo):
    flat = yolo / "flat"
    flat.mkdir()
    for file in [*(yolo / "images/train").iterdir(), *(yolo / "labels/train").iterdir()]:
        shutil.copy(file, flat / file.name)
    (flat / "classes.txt").write_text("dog\ncat & co\nbird\n")
    described(mine={"yolo": str(flat)})
    assert class_names("mine") == NAMES
    assert_same("mine")


def test_yolo_polygons_points_and_scores(described, yolo):
    labels, yaml = yolo / "labels/val/b.txt", "val: images/val\nnames: [dog, cat & co, bird]"
    labels.write_text("0 0.1 0.1 0.5 0.1 0.18 0.266667")
    entry = {**data_yaml(yolo, yaml), "split": "val"}
    described(mine=entry)
    assert_same("mine", {"b.png": [("dog", 5, 6, 20, 10)]})
    labels.write_text(f"{yolo_line('bird', 1, 2, 3, 4)} 0.9")
    described(mine=entry)
    assert_same("mine", {"b.png": [("bird", 1, 2, 3, 4)]})
    labels.write_text(f"{yolo_line('bird', 1, 2, 3, 4)} 0.1 0.1 2 0.2 0.2 2")
    described(mine={**data_yaml(yolo, f"{yaml}\nkpt_shape: [2, 3]"), "split": "val"})
    assert_same("mine", {"b.png": [("bird", 1, 2, 3, 4)]})


def test_yolo_image_without_labels_is_a_background(described, yolo):
    (yolo / "labels/train/b.txt").unlink()
    described(mine={**data_yaml(yolo, "train: images/train\nnames: [dog, c, b]"), "split": "train"})
    assert [len(objects) for objects in boxes("mine").values()] == [2, 0]


@pytest.mark.parametrize(
    "line, text",
    [
        ("3 0.5 0.5 0.1 0.1", "class 3 is out of range for 3 names, counted from 0"),
        ("0.5 0.5 0.5 0.1 0.1", "0.5 0.5 0.5 0.1 0.1 is not a class number and coordinates"),
        ("dog 0.5 0.5 0.1 0.1", "dog 0.5 0.5 0.1 0.1 is not a class number and coordinates"),
        ("0 nan 0.5 0.1 0.1", "is not a class number and coordinates"),
        ("0 0.5 0.5", "0 0.5 0.5 is not a class, x, y, width and height"),
        ("0", "0 is not a class number and coordinates"),
        ("0 25 30 10 10", "is not a class, x, y, width and height relative to the image, 0 to 1"),
    ],
)
def test_broken_line_of_yolo_is_named(described, yolo, line, text):
    (yolo / "labels/val/b.txt").write_text(f"\n{line}\n{yolo_line('bird', 1, 2, 3, 4)}")
    described(mine={**data_yaml(yolo, "val: images/val\nnames: [dog, c, bird]"), "split": "val"})
    (problem,) = inspect_dataset("mine").problems
    assert problem.text.startswith("annotation in line 2 of b.txt: ") and text in problem.text


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: images/none\nnames: [a]", "images/none does not exist; correct the path"),
        ("val: images/val\nnames: [a]", "no split 'train'; its splits are val"),
        ("train: images/train", "class names are missing"),
        ("train: images/train\nnames: {0: a, 2: b}", "numbered from 0 without gaps"),
        ("train: images/train\nnames: [a, a]", "two classes have the same name"),
        ("train: labels\nnames: [a]", "no images in"),
        ("[", "cannot read annotation file .*data.yaml"),
        ("text", "data.yaml is not a mapping of keys"),
    ],
)
def test_yolo_that_makes_no_sense_is_named(described, yolo, text, message):
    described(mine={**data_yaml(yolo, text), "split": "train"})
    with pytest.raises(InputError, match=message):
        load_dataset("mine")
