"""How levels fit boxes: by hand, and suggestions that serve what the configured levels do not."""

import numpy as np
import pytest

from fcos_d2.data.level_fit import Sample, image_levels, measure_fit, suggest_pyramid
from fcos_d2.modeling import FCOSLoss, PointGrid


def rules(strides, sizes, **more):
    return FCOSLoss(num_classes=1, strides=strides, sizes_of_interest=sizes, **more), PointGrid(
        strides
    )


def boxes_of(*boxes) -> np.ndarray:
    return np.array(boxes, float).reshape(-1, 4)


def squares(side, count=50, seed=0) -> list[Sample]:
    """One square per image of 256 x 256, anywhere."""
    corners = np.random.default_rng(seed).uniform(0, 255 - side, (count, 2))
    return [Sample((256, 256), np.append(c, c + side)[None]) for c in corners]


def test_points_of_an_image_end_where_it_ends():
    levels = image_levels((100, 65), PointGrid([8, 16]))
    assert levels.shapes == ((13, 9), (7, 5)) and levels.pitches == ((8, 8), (16, 16))
    assert image_levels((100, 65), PointGrid([8], pitch="floor")).pitches == ((7, 7),)


def test_every_box_is_counted_once_per_level_and_lost_ones_are_told_apart():
    losses, grid = rules([8, 16], [16])
    small, large, between = [0, 0, 16, 16], [64, 64, 128, 128], [17, 17, 19, 19]
    # Two equal boxes: the second has no point left. A box between the points never had one.
    samples = [
        Sample((128, 128), boxes_of(small, large, small)),
        Sample((128, 128), boxes_of(between)),
        Sample((128, 128), boxes_of()),
    ]
    fit = measure_fit(samples, losses, grid)
    assert (fit.num_images, fit.num_boxes) == (3, 4)
    # Of 16 x 16 the four points within reach are 4 pixels from the center.
    assert fit.boxes_per_level == [1, 1] and fit.points_per_level[0] == 4
    assert (fit.too_small, fit.covered, fit.unserved) == (1, 1, 2)
    assert fit.ambiguous == 4


@pytest.mark.parametrize(
    "side, strides, bounds",
    [
        (30, [16, 32], [32]),  # one level would do; the second takes the larger
        (9, [8, 16], [16]),
        (300, [64, 128], [128]),
    ],
)
def test_finest_stride_is_the_largest_that_misses_hardly_any_box(side, strides, bounds):
    pyramid = suggest_pyramid([Sample((999, 999), boxes_of([1, 1, 1 + side, 1 + side]))] * 9)
    assert pyramid.strides == strides and pyramid.sizes_of_interest == bounds


def test_boxes_of_coco_like_sizes_get_the_levels_of_the_paper():
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(8), np.log(1200), (4000, 1))) * rng.uniform(1, 1.2, (4000, 2))
    sample = Sample((800, 1333), np.concatenate([np.zeros((4000, 2)), sides], 1))
    pyramid = suggest_pyramid([sample])
    assert pyramid.strides == [8, 16, 32, 64, 128]
    assert pyramid.sizes_of_interest == [64, 128, 256, 512]


def test_suggested_levels_serve_small_objects_that_the_usual_ones_lose():
    samples = squares(5)
    usual = measure_fit(samples, *rules([8, 16, 32], [64, 128]))
    pyramid = suggest_pyramid(samples)
    fit = measure_fit(samples, *rules(pyramid.strides, pyramid.sizes_of_interest))
    assert pyramid.strides[0] == 4
    assert usual.too_small > 20 and fit.unserved == 0


def test_data_without_boxes_gets_the_usual_levels():
    assert suggest_pyramid([]).strides == [8, 16, 32, 64, 128]
    assert suggest_pyramid([Sample((9, 9), boxes_of([3, 3, 3, 8]))]).strides[0] == 8
