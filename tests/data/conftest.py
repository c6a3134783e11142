"""Fixtures of small datasets."""

import json

import numpy as np
import pytest
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from fcos_d2.data import register_datasets, register_digits
from fcos_d2.data.digits.files import Recipe, ensure_digits
from tests.catalogs import restore_catalogs  # noqa: F401  a fixture

from .two_images import HEIGHT, OBJECTS, WIDTH


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory):
    """Generates 40 training and 8 validation images; tests must not change them."""
    root = tmp_path_factory.mktemp("datasets")
    ensure_digits(root, Recipe(num_images=(40, 8)))
    return root


@pytest.fixture
def registered_digits(digits_root):
    """Registers the small datasets as digits_train and digits_val."""
    register_digits(digits_root)
    yield digits_root
    register_digits()


class CocoData:
    """Three images, and a valid COCO file that tests can change; ``register`` writes it."""

    def __init__(self, folder):
        self.folder = folder
        self.json_file = folder / "shapes.json"
        for number in (1, 2, 3):
            pixels = np.full((40, 60, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        self.content = {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in (1, 2, 3)
            ],
            "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "box"}],
            "annotations": [self.annotation(100 + n, n, 1 + n % 2) for n in (1, 2, 3)],
        }

    @staticmethod
    def annotation(number, image, category, bbox=(5, 6, 20, 10), iscrowd=0):
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": list(bbox),
            "area": bbox[2] * bbox[3],
            "iscrowd": iscrowd,
        }

    def register(self, name="shapes_train", text=None):
        self.json_file.write_text(json.dumps(self.content) if text is None else text)
        register_coco_instances(name, {}, str(self.json_file), str(self.folder))
        return name


@pytest.fixture
def coco(tmp_path):
    """Creates CocoData."""
    return CocoData(tmp_path)


@pytest.fixture
def register():
    """Registers entries, passed as keyword arguments."""
    return lambda **entries: register_datasets(entries)


@pytest.fixture
def root(tmp_path):
    """Creates a folder with the images of ``two_images`` in ``images``."""
    (tmp_path / "images").mkdir()
    for name in OBJECTS:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / name)
    return tmp_path
