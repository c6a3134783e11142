"""Tests checks of whole datasets."""

import pytest
from detectron2.structures import BoxMode
from torch.utils.data import IterableDataset

from fcos_d2.data.inspection import describe_contents, inspect_dataset
from fcos_d2.errors import InputError
from tests.catalogs import register_function

OBJECT = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}


def test_missing_images_are_reported_without_reading_images(coco):
    (coco.folder / "1.png").write_bytes(b"")
    (coco.folder / "2.png").unlink()
    found = inspect_dataset(coco.register(), read_images=False)
    assert found.image_problems == {str(coco.folder / "2.png"): "no such file"}


def test_contents_are_counted(coco):
    annotations = coco.content["annotations"]
    annotations += [
        coco.annotation(201, 1, 1, (5, 6, 20, 10)),
        coco.annotation(202, 1, 1, (5, 6, 20, 10)),  # duplicate
        coco.annotation(203, 1, 1, (50, 6, 12, 10)),  # exceeds the image by two pixels
        coco.annotation(204, 1, 1, (50, 6, 0, 10)),  # zero width
        coco.annotation(205, 1, 1, (0, 0, 30, 30), iscrowd=1),
    ]
    annotations.pop(2)  # in image 3
    coco.content["categories"].append({"id": 7, "name": "unused"})
    contents = describe_contents(inspect_dataset(coco.register()))
    assert contents.boxes_per_class == [5, 1, 0] and contents.images_per_class == [2, 1, 0]
    assert contents.num_boxes == 6
    assert len(contents.notes) == 5 and set(contents.notes.values()) == {1}


@pytest.mark.parametrize("read_images", [True, False])
def test_missing_size_is_read_from_the_image(coco, read_images):
    far = {**OBJECT, "bbox": [1, 2, 62, 9]}
    records = [
        {"file_name": str(coco.folder / "1.png"), "annotations": [OBJECT, far]},
        {"file_name": str(coco.folder / "none.png"), "annotations": []},
    ]
    name = register_function(lambda: records, thing_classes=["disc"])
    found = inspect_dataset(name, read_images)
    (record,) = found.records
    assert (record["width"], record["height"]) == (60, 40)
    assert describe_contents(found).notes == {"boxes that exceed their image": 1}
    assert found.image_problems == {str(coco.folder / "none.png"): "No such file or directory"}
    assert "width" not in records[0]


def test_iterable_dataset_is_rejected():
    class Endless(IterableDataset):
        def __iter__(self):
            raise AssertionError("inspect_dataset must not iterate over it")

    with pytest.raises(InputError, match=r"dataset \(Endless\), .* register a list of dicts"):
        inspect_dataset(register_function(Endless))


@pytest.mark.parametrize("error", ["", "x"])
def test_file_that_is_not_an_image_is_reported(coco, error):
    (coco.folder / "1.png").write_text(error)
    (reason,) = inspect_dataset(coco.register()).image_problems.values()
    assert reason == "it is not an image of a known format"
