"""Tests the search for images whose paths in the annotation file are outdated."""

import pytest

from fcos_d2.data.image_files import locate_images, suggest_folder


@pytest.fixture
def tree(tmp_path):
    def make(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    "files, name, found",
    [
        (["1.jpg"], "1.jpg", "1.jpg"),
        (["1.jpg"], "..\\..\\media\\upload\\4\\1.jpg", "1.jpg"),
        (["1.jpg", "2/1.jpg"], "images/1/1.jpg", "1.jpg"),
        (["1/1.jpg", "2/1.jpg"], "images/1/1.jpg", "1/1.jpg"),
        (["1.jpg"], "/data/upload/1/1.jpg", "1.jpg"),
        (["train/1.jpg"], "1.jpg", "train/1.jpg"),
        (["a/train/1.jpg", "a/val/1.jpg"], "val/1.jpg", "a/val/1.jpg"),
        (["Images/A.jpg"], "images/a.JPG", "Images/A.jpg"),
        (["my photo.jpg"], "my%20photo.jpg", "my photo.jpg"),
        (["a%20b.jpg", "a b.jpg"], "img/a%20b.jpg", "a%20b.jpg"),
        (["1.jpg"], "http://somewhere/set/1.jpg?width=5", "1.jpg"),
        (["set/1.jpg"], "/data/local-files/?d=home/set/1.jpg", "set/1.jpg"),
        (["1.jpg"], "2.jpg", None),
        (["1.jpg"], "1.png", None),
        ([".1.jpg"], "1.jpg", None),
    ],
)
def test_moved_image_is_found_by_the_suffix_of_its_path(tree, files, name, found):
    located = locate_images(tree(*files), [name])
    assert located.paths == [found]
    assert located.missing == ({} if found else {0: "no such file"})


def test_name_that_matches_several_files_is_ambiguous(tree):
    located = locate_images(tree("a/1.jpg", "b/1.jpg"), ["x/1.jpg", "b/1.jpg"])
    assert located.paths == [None, "b/1.jpg"]
    assert located.missing == {0: "2 files match, such as a/1.jpg and b/1.jpg; write the full path"}


def test_cyclic_links_are_followed_once(tree, tmp_path):
    root = tree("a/1.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert locate_images(root, ["x/1.jpg"]).paths == ["a/1.jpg"]


@pytest.mark.parametrize("name", ["\0", "", "..", "/", "\ud800.jpg", "x" * 5000])
def test_invalid_path_is_missing(tree, name):
    assert locate_images(tree("1.jpg"), [name]).paths in ([None], [name])


def test_nearby_folder_is_suggested(tree, tmp_path, monkeypatch):
    root = tree("data/photos/deep/1.jpg", "labels/note.txt")
    monkeypatch.chdir(root)
    assert suggest_folder("data/wrong", "img/1.JPG") == "data/photos/deep"
    assert suggest_folder("elsewhere", "img/1.JPG", ["labels"]) == "data/photos/deep"
    assert suggest_folder("data/wrong", "2.jpg") is None
