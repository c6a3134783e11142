"""Tests how pyramid levels fit boxes, and which levels are suggested."""

import numpy as np
import pytest

from fcos_d2.data.level_fit import Sample, image_levels, measure_fit, suggest_pyramid
from fcos_d2.modeling import FCOSLoss, PointGrid


def build_levels(strides, sizes):
    losses = FCOSLoss(num_classes=1, strides=strides, sizes_of_interest=sizes)
    return losses, PointGrid(strides)


def make_boxes(*boxes) -> np.ndarray:
    return np.array(boxes, float).reshape(-1, 4)


def squares(side, count=50, seed=0) -> list[Sample]:
    """Returns 256 x 256 images with one square at a random position."""
    corners = np.random.default_rng(seed).uniform(0, 255 - side, (count, 2))
    return [Sample((256, 256), np.append(c, c + side)[None]) for c in corners]


def test_points_cover_the_image():
    levels = image_levels((100, 65), PointGrid([8, 16]))
    assert levels.shapes == ((13, 9), (7, 5)) and levels.pitches == ((8, 8), (16, 16))
    assert image_levels((100, 65), PointGrid([8], pitch="floor")).pitches == ((7, 7),)


def test_boxes_are_counted_per_level_and_boxes_without_points_by_cause():
    losses, grid = build_levels([8, 16], [16])
    small, large, between = [0, 0, 16, 16], [64, 64, 128, 128], [17, 17, 19, 19]
    # The first of two equal boxes gets all points. A box between the points gets none.
    samples = [
        Sample((128, 128), make_boxes(small, large, small)),
        Sample((128, 128), make_boxes(between)),
        Sample((128, 128), make_boxes()),
    ]
    fit = measure_fit(samples, losses, grid)
    assert (fit.num_images, fit.num_boxes) == (3, 4)
    # The four points in the 16 x 16 box are 4 pixels from its center.
    assert fit.boxes_per_level == [1, 1] and fit.points_per_level[0] == 4
    assert (fit.too_small, fit.covered, fit.without_points) == (1, 1, 2)
    assert fit.ambiguous == 4


@pytest.mark.parametrize(
    "side, strides, bounds",
    [
        (30, [16, 32], [32]),  # one level is enough; the second one gets the larger boxes
        (9, [8, 16], [16]),
        (300, [64, 128], [128]),
    ],
)
def test_finest_stride_is_the_largest_that_reaches_almost_all_boxes(side, strides, bounds):
    pyramid = suggest_pyramid([Sample((999, 999), make_boxes([1, 1, 1 + side, 1 + side]))] * 9)
    assert pyramid.strides == strides and pyramid.sizes_of_interest == bounds


def test_coco_like_sizes_get_the_levels_of_the_paper():
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(8), np.log(1200), (4000, 1))) * rng.uniform(1, 1.2, (4000, 2))
    sample = Sample((800, 1333), np.concatenate([np.zeros((4000, 2)), sides], 1))
    pyramid = suggest_pyramid([sample])
    assert pyramid.strides == [8, 16, 32, 64, 128]
    assert pyramid.sizes_of_interest == [64, 128, 256, 512]


def test_suggested_levels_reach_small_objects_that_common_levels_miss():
    samples = squares(5)
    common = measure_fit(samples, *build_levels([8, 16, 32], [64, 128]))
    pyramid = suggest_pyramid(samples)
    fit = measure_fit(samples, *build_levels(*pyramid))
    assert pyramid.strides[0] == 4
    assert common.too_small > 20 and fit.without_points == 0


def test_dataset_without_boxes_gets_the_default_levels():
    assert suggest_pyramid([]).strides == [8, 16, 32, 64, 128]
    assert suggest_pyramid([Sample((9, 9), make_boxes([3, 3, 3, 8]))]).strides[0] == 8
