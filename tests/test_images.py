"""Reading pictures of any size, mode and orientation."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from slam_jax.data.images import MAX_PIXELS, check_image, load_image
from slam_jax.errors import InputError

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
        ("I;16", 200, (0, 0, 0)),
        ("I", 200 << 8, (200, 200, 200)),
        ("I", 200, (200, 200, 200)),  # a mask or label map
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected):
    pixels = load_image(Image.new(mode, (8, 8), colour), 8)
    assert pixels.shape == (8, 8, 3)
    assert expected is None or (pixels == expected).all()


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["tiff", "ppm"])
def test_integers_of_32_bits_keep_their_range(kind):
    """Small values in a TIFF are labels. Pillow scales a PGM to 0..65535 and gives 32 bits."""
    values = np.array([[0, 3], [200, 255]], np.int32)
    pixels = load_image(encode(Image.fromarray(values), kind), 2)
    expected = values if kind == "tiff" else values >> 8
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize("value", [65_536, -1])
def test_integers_outside_16_bits_are_refused(value):
    values = np.array([[0, value]], np.int32)
    with pytest.raises(InputError, match=r"its values are .*; expected 0\.\.255 or 0\.\.65535"):
        load_image(encode(Image.fromarray(values), "tiff"), 2)


@pytest.mark.parametrize("shape", [(10_000, 50), (50, 10_000), (1, 3_000)])
def test_a_very_long_picture_keeps_one_pixel_of_its_short_side(shape):
    pixels = load_image(Image.new("RGB", shape, (250, 0, 0)), 48)
    red = (pixels == (250, 0, 0)).all(-1)
    assert red.sum() == 48 and red[24].all() if shape[0] > shape[1] else red[:, 24].all()
    assert (pixels[~red] == GREY).all()


def odd_exif(tag):
    """The bytes of EXIF data with orientation 6 and `tag`, which may be malformed."""
    entries = [struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0"), tag]
    rational = struct.pack("<ii", -1, 0)
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return b"Exif\0\0" + header + b"".join(entries) + bytes(4) + rational


@pytest.mark.parametrize(
    "tag",
    [
        struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0"),  # XResolution as text
        struct.pack("<HHII", 0x011A, 5, 1, 38),  # and as a rational of 2**32 - 1 over 0
        struct.pack("<HHII", 0x9204, 10, 1, 38),  # ExposureBiasValue as -1 over 0
        struct.pack("<HHII", 0x8769, 4, 1, 9_999),  # a directory beyond the end
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_orientation_is_applied_whatever_the_other_tags_hold(kind, tag):
    image = Image.new("RGB", (96, 48), (255, 0, 0))
    image.paste((0, 0, 255), (48, 0, 96, 48))
    pixels = load_image(encode(image, kind, quality=95, exif=odd_exif(tag)), 48).astype(int)
    np.testing.assert_allclose(pixels[4, 24], (255, 0, 0), atol=4)
    np.testing.assert_allclose(pixels[44, 24], (0, 0, 255), atol=4)
    assert (pixels[:, :12] == GREY).all()


def test_exif_that_cannot_be_parsed_is_ignored():
    picture = encode(Image.new("RGB", (8, 8), (255, 0, 0)), "png", exif=b"Exif\0\0no EXIF at all")
    assert (load_image(picture, 8) == (255, 0, 0)).all()


def test_more_pixels_than_the_bound_are_refused_before_they_are_decoded():
    side = int(MAX_PIXELS**0.5)
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
    with pytest.raises(ValueError, match="has far too many pixels; at most 64,000,000 are read"):
        load_image(file.getvalue(), 8)


def test_a_drawing_is_not_handed_to_the_program_that_draws_it(tmp_path, monkeypatch):
    program, ran = tmp_path / "gs", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\necho ran > {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # look for it again
    file = encode(Image.new("RGB", (8, 8)), "eps")
    (tmp_path / "cat.png").write_bytes(file)
    for source in (file, tmp_path / "cat.png"):
        for read in (check_image, lambda source: load_image(source, 8)):
            with pytest.raises(ValueError, match=r"is a drawing \(EPS\); give a PNG or JPEG"):
                read(source)
    assert not ran.exists()
