"""Tests Pascal VOC, and XML files of CVAT."""

import re
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.inspection import clean, inspect_dataset
from fcos_d2.errors import InputError

from .two_images import HEIGHT, OBJECTS, WIDTH, assert_recognized, assert_same, boxes, write

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
    """Writes a VOC dataset with the splits "train" (both images) and "val" (one image)."""
    for folder in VOC[:2]:
        (root / folder).mkdir(parents=True)
    (root / "images").rename(root / "JPEGImages")
    for file, objects in OBJECTS.items():
        (root / "Annotations" / f"{Path(file).stem}.xml").write_text(voc_text(file, objects))
    (root / "ImageSets/Main/train.txt").write_text("a  1\nb -1\n\n")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    return root


def test_voc_coordinates_become_zero_based_and_classes_come_from_all_splits(register, voc):
    register(pets={"voc": str(voc), "split": "train"}, few={"voc": str(voc), "split": "val"})
    assert class_names("pets") == class_names("few") == ["bird", "cat & co", "dog"]
    assert_same("pets")
    assert_same("few", {"b.png": OBJECTS["b.png"]})
    assert_recognized(register, voc, train=OBJECTS, val=["b.png"])
    crowds = [a["iscrowd"] for record in load_dataset("pets") for a in record["annotations"]]
    assert crowds == [0, 1, 0]


def test_voc_classes_can_be_selected_and_ordered(register, voc):
    register(pets={"voc": str(voc), "split": "train", "classes": ["dog", "bird"]})
    assert_same("pets", {"a.jpg": OBJECTS["a.jpg"][:1], "b.png": OBJECTS["b.png"]})


def images_next_to_xml(voc):
    for path in (voc / "JPEGImages").iterdir():
        path.rename(voc / "Annotations" / path.name)
    return {"voc": str(voc / "Annotations")}


def lower_case(voc):
    (voc / "Annotations").rename(voc / "annotations")
    (voc / "JPEGImages").rename(voc / "images")
    shutil.rmtree(voc / "ImageSets")
    return {"voc": str(voc)}


def explicit_folders(voc):
    return {"voc": {"xml": str(voc / "Annotations"), "images": str(voc / "JPEGImages")}}


def images_and_xml_in_images(voc):
    images_next_to_xml(voc)
    (voc / "Annotations").rename(voc / "images")
    (voc / "JPEGImages").rmdir()
    return {"voc": str(voc)}


@pytest.mark.parametrize(
    "layout", [images_next_to_xml, lower_case, explicit_folders, images_and_xml_in_images]
)
def test_common_voc_layouts_are_read(register, voc, layout):
    entry = layout(voc)
    register(pets=entry, part={**entry, "part": [0, 1]})
    assert_same("pets")
    assert_same("part")


@pytest.mark.parametrize("in_one_folder", [True, False])
def test_voc_folder_without_splits_is_recognized(register, voc, in_one_folder):
    lower_case(voc)
    for image in (voc / "images").iterdir() if in_one_folder else ():
        image.rename(voc / "annotations" / image.name)
    assert_recognized(register, voc / "annotations" if in_one_folder else voc, all=OBJECTS)


def test_voc_folders_of_splits_are_recognized(register, voc):
    for split, file in (("train", "a.jpg"), ("valid", "b.png")):
        (voc / split).mkdir()
        (voc / "JPEGImages" / file).rename(voc / split / file)
        xml = f"{file[0]}.xml"
        (voc / "Annotations" / xml).rename(voc / split / xml)
    shutil.rmtree(voc / "ImageSets")
    assert_recognized(register, voc, train=["a.jpg"], val=["b.png"])


LINES = ('"my photo 1"', "\ufeffmy photo 1.jpg", "my photo 1  -1")
LINES += ("images\\my photo 1.JPG", "  my photo 1.xml \r")


@pytest.mark.parametrize("line", LINES)
def test_lines_of_voc_lists_are_parsed(register, voc, line):
    for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (voc / folder / f"a.{suffix}").rename(voc / folder / f"my photo 1.{suffix}")
    (voc / "ImageSets/Main/train.txt").write_text(f"{line}\nb\n", encoding="utf-8")
    register(pets={"voc": str(voc), "split": "train"})
    assert boxes("pets").keys() == {"my photo 1.jpg", "b.png"}


def test_voc_list_can_be_in_any_folder(register, voc):
    (voc / "mine.txt").write_text("b")
    register(pets={"voc": str(voc), "split": str(voc / "mine.txt")})
    assert_same("pets", {"b.png": OBJECTS["b.png"]})


def test_listed_image_without_xml_has_no_objects(register, voc):
    (voc / "Annotations" / "b.xml").unlink()
    register(pets={"voc": str(voc), "split": "train"})
    assert_same("pets", {**OBJECTS, "b.png": []})


def test_voc_files_outside_the_split_are_ignored(register, voc):
    (voc / "Annotations" / "._a.xml").write_bytes(b"\0hidden")
    (voc / "Annotations" / "c.xml").write_text("<annotation>")
    (voc / "JPEGImages" / "a.txt").write_text("no image")
    register(pets={"voc": str(voc), "split": "train"})
    assert_same("pets")


def test_all_voc_defects_are_listed_and_cleaned(register, voc):
    replace_text(voc / "Annotations/a.xml", "<xmin>1</xmin>", "<xmin>x</xmin>")
    (voc / "Annotations/c.xml").write_text("<annotation>")
    (voc / "Annotations/d.xml").write_text("")
    (voc / "ImageSets/Main/train.txt").write_text("a\nb\nc\nd\nnone")
    (voc / "JPEGImages/b.png").write_bytes((voc / "JPEGImages/b.png").read_bytes()[:60])
    register(pets={"voc": str(voc), "split": "train"})
    found = inspect_dataset("pets")
    starts = [f"cannot read annotation file .*{file}.xml" for file in "cd"]
    starts += [
        "image none: there is neither an image nor an XML file",
        r"annotation 0 of a.xml: bbox must be .* got \['x', 1.0",
    ]
    for start in starts:
        assert any(re.match(start, problem.text) for problem in found.problems), start
    assert len(found.problems) == 4 and len(found.image_problems) == 1
    (cleaned,) = clean([found], [found])
    assert cleaned.file == str(voc / "train")
    path = write(voc / "train_clean.json", cleaned.content)
    register(clean={"json": path, "images": str(voc / "JPEGImages")})
    assert_same("clean", {"a.jpg": OBJECTS["a.jpg"][1:]})


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("width", ["<width>0</width>", ""])
def test_missing_voc_size_is_read_from_the_image(register, voc, width):
    replace_text(voc / "Annotations" / "b.xml", "<width>50</width>", width)
    register(pets={"voc": str(voc), "split": "train"})
    found = inspect_dataset("pets")
    assert found.repaired == {"no size": 1} and found.num_problems == 0


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("<name>bird</name>", "<name> </name>", "annotation 0 of b.xml: the class name is missing"),
        ("<xmin>2</xmin>", "", r"annotation 0 of b.xml: bbox must be .* got \['', 3.0"),
    ],
)
def test_ambiguous_voc_defects_are_rejected(register, voc, old, new, text):
    replace_text(voc / "Annotations" / "b.xml", old, new)
    register(pets={"voc": str(voc), "split": "train"})
    with pytest.raises(InputError, match=text):
        load_dataset("pets")


@pytest.mark.parametrize("encoding", ["GBK", "ISO-8859-1", "UTF-16"])
def test_xml_is_read_in_its_declared_encoding(register, voc, encoding):
    name = "猫" if encoding in ("GBK", "UTF-16") else "Käfer"
    head = f'<?xml version="1.0" encoding="{encoding}"?>\n'
    text = voc_text("b.png", [(name, 1, 2, 3, 4)], head)
    (voc / "Annotations" / "b.xml").write_bytes(text.encode(encoding))
    register(pets={"voc": str(voc), "split": "val"})
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
def test_missing_voc_files_are_reported(register, voc, monkeypatch, entry, text):
    monkeypatch.chdir(voc)
    (voc / "ImageSets/Main/empty.txt").write_text("\n")
    register(pets={"voc": str(voc), **entry})
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


def test_cvat_classes_have_the_order_of_the_task(register, root):
    items = {
        file: "".join(
            f'<box label="{escape(label)}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
            for label, x, y, w, h in objects
        )
        for file, objects in OBJECTS.items()
    }
    register(mine={"cvat": cvat(root, items), "images": str(root / "images")})
    assert class_names("mine") == ["dog", "cat & co", "bird"]
    assert_same("mine")
    assert_recognized(register, root, all=OBJECTS)


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
def test_cvat_shapes_become_boxes(register, root, shape, box):
    register(mine={"cvat": cvat(root, {"a.jpg": shape}), "images": str(root / "images")})
    assert_same("mine", {"a.jpg": [("dog", *box)]})


def test_invalid_cvat_shapes_are_listed_and_videos_rejected(register, root):
    items = {"a.jpg": '<box label="dog" xtl="?"/><cuboid label="dog"/>', "b.png": ""}
    register(mine={"cvat": cvat(root, items), "images": str(root / "images")})
    texts = [problem.text for problem in inspect_dataset("mine").problems]
    assert texts[0].startswith("annotation 0 of a.jpg: {") and texts[1].startswith("annotation 1 ")
    assert "'xtl': '?'" in texts[0] and texts[0].endswith("is not a shape with a box")
    (root / "annotations.xml").write_text("<annotations><track/></annotations>")
    register(mine={"cvat": str(root / "annotations.xml"), "images": str(root / "images")})
    with pytest.raises(InputError, match="tracks of a video; export the task as 'CVAT for images'"):
        load_dataset("mine")
