"""Defines two images whose annotations the tests write in various formats."""

import json
from pathlib import Path

import pytest

from fcos_d2.data import class_names, load_dataset
from fcos_d2.data.formats.folders import recognize

# Image -> objects: class, x, y, width and height.
OBJECTS = {
    "a.jpg": [("dog", 0, 0, 10, 20), ("cat & co", 4, 5, 26, 35)],
    "b.png": [("bird", 1, 2, 3, 4)],
}
WIDTH, HEIGHT = 50, 60


def boxes(name) -> dict[str, list]:
    """Returns class and box of every object, by file name."""
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


def write(path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def assert_recognized(register, folder, **splits):
    """Asserts that ``recognize`` finds these splits with the objects of these files."""
    entries = recognize(folder)
    assert entries.keys() == splits.keys()
    register(**{f"found_{split}": entry for split, entry in entries.items()})
    for split, files in splits.items():
        assert_same(f"found_{split}", {file: OBJECTS[file] for file in files})
