"""Tests reading of image files, and their names."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from fcos_d2.data.images import can_hold_rgb, distinct_names, image_sizes, is_image, read_image
from fcos_d2.errors import InputError


def write_deep_image(path, kind):
    """Writes an image with integers up to 65535 or floats up to 1."""
    shades = np.linspace(0, 1, 60 * 40).reshape(40, 60)
    pixels = shades.astype(np.float32) if kind == "F" else (shades * 65535).astype(kind)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    "name, kind, mode, words",
    [
        ("a.png", np.uint16, "I;16", "16-bit integers"),
        ("a.tif", ">u2", "I;16B", "16-bit integers"),
        ("a.tif", np.int32, "I", "integers of more than 8 bits"),
        ("a.tif", "F", "F", "floats"),
    ],
)
def test_more_than_8_bits_are_rejected_instead_of_clipped(tmp_path, name, kind, mode, words):
    path = write_deep_image(tmp_path / name, kind)
    with pytest.raises(InputError) as caught:
        read_image(str(path), "RGB")
    assert str(caught.value) == (
        f"its pixels are {words} (Pillow's mode {mode}); convert it to 8 bits per channel"
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_8_bit_images_of_all_modes_are_read(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
    pixels = read_image(str(path), "BGR")
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8 and (pixels == 255).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation, angle", [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_orientation_is_applied_once_or_not_at_all(tmp_path, suffix, orientation, angle):
    """Stores an upright image with a bright quadrant, rotated by ``angle``."""
    upright = np.full((32, 48, 3), 10, np.uint8)
    upright[:16, :24] = 240
    stored = Image.fromarray(upright).rotate(angle, expand=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = str(tmp_path / f"a.{suffix}")
    stored.save(path, exif=exif)
    as_stored = upright if suffix == "tif" else np.asarray(stored)  # Pillow rotates TIFFs itself
    for is_upright, expected in ((True, upright), (False, as_stored)):
        found = read_image(path, "RGB", is_upright)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 5
    assert image_sizes(path) == ((48, 32), as_stored.shape[1::-1])


def test_image_and_rgb_suffixes_are_recognized():
    assert all(map(is_image, ("a.jpg", "a/b.PNG", Path("x.webp"), "a.psd")))
    assert not any(map(is_image, ("a.txt", "a.pdf", "a.mpg", "jpg", "a")))
    assert all(map(can_hold_rgb, ("a.jpg", "b.PNG", "c.tif", "d.bmp")))
    assert not any(map(can_hold_rgb, ("a.psd", "a.xpm", "a.xbm", "a.msp", "a.txt", "a")))


@pytest.mark.parametrize(
    "names, distinct",
    [
        (["0.png", "1.png", "a/0.png"], ["0.png", "1.png", "a/0.png"]),
        (["0.png", "0.png", "0.png"], ["0.png", "0_2.png", "0_3.png"]),
        (["0.png", "0.png", "0_2.png"], ["0.png", "0_3.png", "0_2.png"]),
    ],
)
def test_repeated_names_are_numbered(names, distinct):
    assert distinct_names(map(Path, names)) == list(map(Path, distinct))
