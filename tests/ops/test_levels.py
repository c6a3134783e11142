"""Coordinates of pyramid points."""

import pytest
import torch

from fcos_d2.ops import make_levels, point_coordinates


def test_points_are_cell_centers_in_level_major_row_major_order():
    levels = make_levels([(2, 3), (1, 2)], [8, 16])
    assert levels.num_points == 8
    assert point_coordinates(levels).tolist() == [
        [4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]
    ]  # fmt: skip


def test_first_point_is_at_the_corner_with_offset_zero():
    assert point_coordinates(make_levels([(1, 2)], [8], offset=0.0)).tolist() == [[0, 0], [8, 0]]


def test_pitch_follows_the_image_if_the_map_was_rounded_up():
    # 800 x 1344 through stride-2 convolutions: P6 is 13 x 21 and P7 is 7 x 11 (torchvision).
    levels = make_levels([(13, 21), (7, 11)], [64, 128], offset=0.0, image_shape=(800, 1344))
    assert levels.pitches == ((61, 64), (114, 122))
    assert point_coordinates(levels)[22].tolist() == [64, 61]
    centered = levels._replace(offset=0.5)  # still a fraction of the stride
    assert point_coordinates(centered)[22].tolist() == [64 + 32, 61 + 32]


def test_empty_level_has_no_points():
    assert point_coordinates(make_levels([(0, 3), (1, 1)], [8, 16])).shape == (1, 2)


@pytest.mark.parametrize(
    "shapes, strides", [([(1, 1)], [8, 16]), ([(1, 1)], [0]), ([(-1, 1)], [8])]
)
def test_invalid_geometry_is_rejected(shapes, strides):
    with pytest.raises(ValueError, match="make_levels: expected"):
        make_levels(shapes, strides)


def test_device_is_respected(device):
    assert point_coordinates(make_levels([(1, 1)], [8]), device).device.type == device.type
    assert torch.equal(
        point_coordinates(make_levels([(1, 1)], [8]), device).cpu(), torch.tensor([[4.0, 4.0]])
    )
