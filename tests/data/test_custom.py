"""Data sets described in the config: COCO files, parts of them, Pascal VOC folders."""

import json
from xml.sax.saxutils import escape

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fcos_d2.data import class_names, count_classes, load_dataset, register_datasets
from fcos_d2.data.custom import take_part
from fcos_d2.errors import InputError


@pytest.fixture
def described():
    """register_datasets, undone afterwards."""
    names = []

    def register(**entries):
        names.extend(entries)
        register_datasets(entries)

    yield register
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def entry(coco, **more) -> dict:
    coco.json_file.write_text(json.dumps(coco.content))
    return {"json": str(coco.json_file), "images": str(coco.folder), **more}


def test_described_coco_file_is_what_detectron2_loads(described, coco):
    described(mine=entry(coco))
    assert class_names("mine") == ["disc", "box"] and count_classes("mine") == 2
    records = load_dataset("mine")
    assert records == load_dataset(coco.register())
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    assert class_names("mine") == MetadataCatalog.get("mine").thing_classes


def test_nothing_is_read_before_it_is_needed(described):
    described(mine={"json": "none.json", "images": "none"})
    with pytest.raises(InputError, match="none.json does not exist; .*DATASETS.REGISTER.mine"):
        load_dataset("mine")


def test_parts_share_no_image_and_lose_none(described, coco):
    coco.content["images"] = [
        {**coco.content["images"][0], "id": n, "file_name": f"{n}.png"} for n in range(300)
    ]
    coco.content["annotations"] = [coco.annotation(n + 1, n, 1) for n in range(300)]
    train, val = (take_part(coco.content, *part) for part in ((0, 0.8), (0.8, 1)))
    ids = [{image["id"] for image in part["images"]} for part in (train, val)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 300
    assert 210 < len(ids[0]) < 270
    for part, images in zip((train, val), ids, strict=True):
        assert {a["image_id"] for a in part["annotations"]} == images
        assert part["categories"] == coco.content["categories"]
    more = {**coco.content, "images": [*coco.content["images"], {"id": 999, "file_name": "new"}]}
    assert ids[0] <= {image["id"] for image in take_part(more, 0, 0.8)["images"]}


def test_described_parts_are_evaluated_on_their_own_images_alone(described, coco):
    described(all=entry(coco), one=entry(coco, part=[0, 0.5]), other=entry(coco, part=[0.5, 1]))
    parts = [load_dataset(name, filter_empty=False) for name in ("one", "other")]
    files = [{record["file_name"] for record in part} for part in parts]
    assert len(files[0]) + len(files[1]) == 3 and not files[0] & files[1]
    for name, part in zip(("one", "other"), files, strict=True):
        with open(MetadataCatalog.get(name).json_file) as f:
            assert len(json.load(f)["images"]) == len(part)


def test_problem_in_a_part_is_told_with_the_users_own_file(described, coco):
    coco.content["annotations"][0]["bbox"][2] = -3
    described(mine=entry(coco, part=[0, 1]))
    with pytest.raises(InputError, match=f"{coco.json_file}: annotation 101: .*negative size"):
        load_dataset("mine")


def test_part_without_images_says_so(described, coco):
    described(mine=entry(coco, part=[0, 1e-9]))
    with pytest.raises(InputError, match="mine.part .* holds none of the images"):
        class_names("mine")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("labels.json", "must say where the data lies, got 'labels.json'"),
        ({}, "must say where the data lies"),
        ({"json": "a", "voc": "b"}, "must say where"),
        ({"json": "a"}, "has no 'images'"),
        ({"voc": "a"}, "has no 'split'"),
        ({"json": "a", "images": "b", "image": "c"}, "unknown key 'image'"),
        ({"json": "a", "images": "b", "part": 0.8}, r"two shares like \[0, 0.8\], got 0.8"),
        ({"json": "a", "images": "b", "part": [0.8, 0.2]}, "two shares"),
        ({"json": "a", "images": "b", "part": ["0", "1"]}, "two shares"),
        ({"voc": "a", "split": "b", "classes": "dog"}, "a list of names, got 'dog'"),
        ({"voc": "a", "split": "b", "classes": [1, 2]}, r"a list of names, got \[1, 2\]"),
    ],
)
def test_entry_that_makes_no_sense_is_one_line(described, wrong, message):
    with pytest.raises(InputError, match=f"DATASETS.REGISTER.mine.*{message}"):
        described(mine=wrong)


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "a\\b", "..", ".hidden", "-x", "", "a\n", "\0", "x" * 201, 5]
)
def test_name_that_could_be_a_path_is_refused(coco, name):
    with pytest.raises(InputError, match="DATASETS.REGISTER has the name .*use letters, digits"):
        register_datasets({name: entry(coco)})
    assert name not in DatasetCatalog


@pytest.mark.parametrize("name", ["x", "dice_train", "DOTA-1.0_val", "2024", "Würfel", "x" * 200])
def test_usual_names_become_files(described, coco, name):
    described(**{name: entry(coco, part=[0, 1])})
    assert len(load_dataset(name)) == 3
    assert MetadataCatalog.get(name).json_file.endswith(f"/{name}.json")


def test_names_of_other_data_are_not_taken_over_but_ones_own_may_change(described, coco):
    with pytest.raises(InputError, match="digits_val: a data set of this name exists"):
        register_datasets({"digits_val": entry(coco)})
    described(mine={"json": "none.json", "images": "none"})
    described(mine=entry(coco))
    assert len(load_dataset("mine")) == 3


def test_home_and_variables_in_paths_are_replaced(described, coco, monkeypatch):
    monkeypatch.setenv("PICTURES", str(coco.folder))
    monkeypatch.setenv("HOME", str(coco.folder))
    entry(coco)
    described(mine={"json": "~/shapes.json", "images": "$PICTURES"})
    assert len(load_dataset("mine")) == 3


# ---- Pascal VOC ----


@pytest.fixture
def voc(tmp_path):
    """Two images of a VOC folder, one of them a PNG, and the split "train" with both."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for stem, suffix, objects in (
        ("a", "jpg", [("dog", 1, 1, 10, 20, 0), ("cat & co", 5, 6, 30, 40, 1)]),
        ("b", "png", [("bird", 2, 3, 4, 5, 0)]),
    ):
        Image.new("RGB", (50, 60)).save(root / "JPEGImages" / f"{stem}.{suffix}")
        boxes = "".join(
            f"<object><name>{escape(name)}</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, x0, y0, x1, y1, difficult in objects
        )
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.{suffix}</filename><size><width>50</width>"
            f"<height>60</height></size>{boxes}</annotation>"
        )
    (root / "ImageSets" / "Main" / "train.txt").write_text("a  1\nb -1\n\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    return root


def test_voc_folder_counts_pixels_from_zero_and_sorts_the_classes_of_all_splits(described, voc):
    described(pets={"voc": str(voc), "split": "train"}, few={"voc": str(voc), "split": "val"})
    first, second = load_dataset("pets")
    assert class_names("pets") == class_names("few") == ["bird", "cat & co", "dog"]
    dog, cat = first["annotations"]
    assert dog["bbox"] == [0, 0, 10, 20] and dog["category_id"] == 2 and not dog["iscrowd"]
    assert cat["bbox"] == [4, 5, 26, 35] and cat["iscrowd"] == 1
    assert second["file_name"] == str(voc / "JPEGImages" / "b.png")
    assert (second["width"], second["height"]) == (50, 60)


def test_voc_image_is_never_another_file_of_its_name(described, voc):
    for name in ("a.txt", "a.xml", "b.json"):
        (voc / "JPEGImages" / name).write_text("no image")
    described(pets={"voc": str(voc), "split": "train"})
    files = [record["file_name"] for record in load_dataset("pets")]
    assert files == [str(voc / "JPEGImages" / name) for name in ("a.jpg", "b.png")]


def test_voc_classes_can_be_given_in_an_order(described, voc):
    described(pets={"voc": str(voc), "split": "train", "classes": ["dog", "cat & co", "bird"]})
    assert class_names("pets") == ["dog", "cat & co", "bird"]
    described(pets={"voc": str(voc), "split": "train", "classes": ["dog", "bird"]})
    with pytest.raises(InputError, match=r"a.xml: class 'cat & co' is none of dog, bird"):
        load_dataset("pets")


def spoil(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("<xmin>2</xmin>", "", r"b.xml: bndbox/xmin must be a number, got None"),
        ("<width>50</width>", "<width>?</width>", r"b.xml: size/width must be a number, got '\?'"),
        ("</annotation>", "", r"cannot read annotation file .*b.xml"),
        ("<xmin>2</xmin>", "<xmin>99</xmin>", r"b.xml: bndbox of '\w+' is \[99.0, .* must be xmin"),
        ("<name>bird</name>", "", r"b.xml: an object has no name"),
        ("<name>bird</name>", "<name> </name>", r"b.xml: an object has no name"),
        ("<width>50</width>", "<width>0</width>", r"b.xml: size/width must be at least 1, got 0"),
        ("<height>60<", "<height>-60<", r"b.xml: size/height must be at least 1, got -60"),
    ],
)
def test_what_is_wrong_in_a_voc_file_is_named(described, voc, old, new, message):
    spoil(voc / "Annotations" / "b.xml", old, new)
    described(pets={"voc": str(voc), "split": "train"})
    with pytest.raises(InputError, match=message):
        load_dataset("pets")


def test_missing_split_of_a_voc_folder_is_named(described, voc):
    described(pets={"voc": str(voc), "split": "test"})
    with pytest.raises(InputError, match=r"cannot read .*Main/test.txt"):
        load_dataset("pets")
