"""Helpers for tests that register datasets."""

from collections.abc import Callable, Iterable, Mapping

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture(autouse=True)
def restore_catalogs():
    """Unregisters the datasets that a test registers."""
    before = [(catalog, set(catalog)) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, names in before:
        for name in set(catalog) - names:
            del catalog[name]


def register_function(function: Callable, name: str = "custom", **metadata) -> str:
    """Registers a dataset function with metadata, and returns the name."""
    DatasetCatalog.register(name, function)
    MetadataCatalog.get(name).set(**metadata)
    return name


def coco_content(
    objects: Mapping[str, Iterable[tuple]], classes: Iterable[str], size: tuple[int, int]
) -> dict:
    """Returns the content of a COCO file.

    Args:
        objects: file name -> objects of the image: class (from 1), box [x, y, width, height] and,
            optionally, iscrowd.
        classes: class names.
        size: width and height of all images.
    """
    images, annotations = [], []
    for number, (name, found) in enumerate(objects.items(), 1):
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for class_, box, *iscrowd in found:
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": class_}
            annotation |= {"bbox": list(map(float, box)), "area": float(box[2] * box[3])}
            annotations.append({**annotation, "iscrowd": iscrowd[0] if iscrowd else 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
