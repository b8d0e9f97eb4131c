"""Pictures of any kind become the pixels of a model."""

import io

import numpy as np
import pytest
from PIL import Image

from slam_jax.data.images import MOST_PIXELS, check_image, load_image

GREY = (128, 128, 128)


def test_proportions_are_kept_and_the_rest_is_grey():
    image = Image.new("RGB", (40, 10), (250, 0, 0))
    pixels = load_image(image, 16)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert (pixels[:5] == GREY).all() and (pixels[-5:] == GREY).all()
    assert (pixels[7:9] == (250, 0, 0)).all()


def test_a_picture_of_the_right_size_is_left_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(load_image(pixels, 16), pixels)
    np.testing.assert_array_equal(load_image(Image.fromarray(pixels), 16), pixels)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 0), (255, 255, 255)),
        ("P", 0, None),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("I;16", 200 << 8, (200, 200, 200)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected):
    pixels = load_image(Image.new(mode, (8, 8), colour), 8)
    assert pixels.shape == (8, 8, 3)
    assert expected is None or (pixels == expected).all()


def test_a_picture_is_turned_as_its_camera_says():
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    pixels = load_image(file.getvalue(), 8)
    assert (pixels[:4] == 0).all() and (pixels[4:] == 255).all()


def test_more_pixels_than_the_bound_are_refused_before_they_are_decoded():
    side = int(MOST_PIXELS**0.5)
    file = io.BytesIO()
    Image.new("1", (side + 1, side + 1)).save(file, "png")
    assert len(file.getvalue()) < 50_000
    for read in (check_image, lambda source: load_image(source, 8)):
        with pytest.raises(ValueError, match="has 8,001 x 8,001 pixels; at most 64,000,000"):
            read(file.getvalue())
    assert check_image(Image.new("1", (side, side))) == (side, side)


def test_a_bomb_beyond_the_librarys_own_bound_is_refused_alike(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "png")
    with pytest.raises(ValueError, match="more pixels than the 64,000,000 that are read"):
        load_image(file.getvalue(), 8)
