"""One model serves several threads at once: each gets the bits that it would get alone."""

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

SIZES = [(64, 96), (96, 64), (33, 130), (128, 128)]  # each thread has one of its own at any moment
ROUNDS = 3
MODELS = [
    {},
    {"CONVENTION": "torchvision", "NMS_METHOD": "linear"},
    {"CONVENTION": "mmdet_tricks", "USE_DEFORMABLE": True, "NORM": "BN"},
]


def picture(height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng([height, width])
    return generator.integers(256, size=(height, width, 3), dtype=np.uint8)


def in_turn(find, pictures, first: int) -> list:
    """Results of all pictures in their order, looked at from number ``first`` on."""
    order = [(first + n) % len(pictures) for n in range(len(pictures))]
    found = {number: find(pictures[number]) for number in order}
    return [found[number] for number in range(len(pictures))]


def assert_same_together(find, fresh) -> None:
    """Compares ``fresh``, which no call has warmed up yet, with ``find``, its copy, alone."""
    pictures = [picture(*size) for size in SIZES]
    alone = [find(one) for one in pictures]
    calls = [partial(in_turn, fresh, pictures, first) for first in range(len(pictures))]
    for results in run_concurrently(calls, ROUNDS):
        for result in results:
            for found, expected in zip(result, alone, strict=True):
                assert len(found) == len(expected)
                assert all(map(np.array_equal, found, expected))


def detector(model):
    """picture -> boxes, scores and classes."""

    def find(pixels: np.ndarray) -> list[np.ndarray]:
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        with torch.no_grad():
            found = model([{"image": image}])[0]["instances"]
        assert len(found) > 0, "nothing is found that could differ"
        return [x.numpy() for x in (found.pred_boxes.tensor, found.scores, found.pred_classes)]

    return find


def two_of(**settings):
    model = tiny_fcos(INFERENCE_TH_TEST=0.005, **settings).eval()
    return model, deepcopy(model)


@pytest.mark.parametrize("settings", MODELS)
def test_detector(settings):
    assert_same_together(*map(detector, two_of(**settings)))


def test_detector_with_augmentation():
    views = DatasetMapperTTA(min_sizes=[48, 64], max_size=160, flip=True)
    models = [FCOSWithTTA(model=model, views=views) for model in two_of()]
    assert_same_together(*map(detector, models))


def test_predictor():
    predictors = [Predictor(model, (64, 96), "BGR", 0.005) for model in two_of()]
    assert_same_together(*[lambda pixels, p=p: p(pixels) for p in predictors])


def test_predictor_with_batches_of_several_sizes():
    predictors = [Predictor(model, (64, 96), "RGB", 0.005) for model in two_of()]
    other = picture(40, 70)
    assert_same_together(*[lambda pixels, p=p: p.predict([pixels, other])[0] for p in predictors])
