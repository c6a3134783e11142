"""Threads that share a model get bitwise the same results as a single thread."""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.modeling import DatasetMapperTTA

from fcos_d2.modeling.tta import FCOSWithTTA
from fcos_d2.predictor import Predictor
from tests.concurrency import run_concurrently

from .tiny import tiny_fcos

SIZES = [(64, 96), (96, 64), (33, 130), (128, 128)]  # threads process different ones at a time
ROUNDS = 3


def random_image(height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng([height, width])
    return generator.integers(256, size=(height, width, 3), dtype=np.uint8)


def detector(model):
    def detect(pixels: np.ndarray) -> list[np.ndarray]:
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        with torch.no_grad():
            found = model([{"image": image}])[0]["instances"]
        assert len(found) > 0, "no detections to compare"
        return [x.numpy() for x in (found.pred_boxes.tensor, found.scores, found.pred_classes)]

    return detect


def detector_with_augmentation(model):
    views = DatasetMapperTTA(min_sizes=[48, 64], max_size=160, flip=True)
    return detector(FCOSWithTTA(model=model, views=views))


def predictor(model):
    predictor = Predictor(model, (64, 96), "BGR", 0.005)

    def predict(pixels: np.ndarray) -> list[np.ndarray]:
        found = predictor.predict([pixels, random_image(40, 70)])[0]
        return [found.boxes, found.scores, found.classes]

    return predict


@pytest.mark.parametrize(
    "make, settings",
    [
        (detector, {}),
        (detector, {"CONVENTION": "torchvision", "NMS_METHOD": "linear"}),
        (detector, {"CONVENTION": "mmdet_tricks", "USE_DEFORMABLE": True, "NORM": "BN"}),
        (detector_with_augmentation, {}),
        (predictor, {}),
    ],
)
def test_threads_share_a_model(make, settings):
    model = tiny_fcos(INFERENCE_TH_TEST=0.005, **settings).eval()
    fresh = make(deepcopy(model))  # not warmed up by a call
    images = [random_image(*size) for size in SIZES]
    alone = [make(model)(image) for image in images]
    # Every thread processes all images, each starting with a different one.
    orders = [np.roll(range(len(images)), -first) for first in range(len(images))]
    calls = [partial(lambda order: [fresh(images[i]) for i in order], order) for order in orders]
    for order, rounds in zip(orders, run_concurrently(calls, ROUNDS), strict=True):
        for results in rounds:
            for number, found in zip(order, results, strict=True):
                assert len(found) == len(alone[number])
                assert all(map(np.array_equal, found, alone[number]))
