"""Every mode and bit depth of pictures becomes the right RGB."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slam_jax.data.images import check_image, load_image
from slam_jax.errors import InputError
from slam_jax.vision_models import Preprocessing, preprocess

WHITE = (255, 255, 255)


def png(depth: int, kind: int, rows: list[bytes], **chunks: bytes) -> bytes:
    """A PNG file of two columns. kind: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", 2, len(rows), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [("IHDR", header), *chunks.items(), ("IDAT", data), ("IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in parts:
        body = name.encode() + content
        file += struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    return file


def tiff(
    order: str,
    bits: list[int],
    photometric: int,
    pixels: bytes,
    *,
    extra: int | None = None,
    sample_format: int = 1,
    colours: list[int] | None = None,
) -> bytes:
    """An uncompressed TIFF file of two columns and one row. order: "<" or ">"."""
    tags: list[tuple[int, int, list[int]]] = [
        (256, 3, [2]),
        (257, 3, [1]),
        (258, 3, bits),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, [0]),  # where the pixels are, filled in below
        (277, 3, [len(bits)]),
        (278, 3, [1]),
        (279, 4, [len(pixels)]),
        *([(320, 3, colours)] if colours else []),
        *([(338, 3, [extra])] if extra is not None else []),
        (339, 3, [sample_format] * len(bits)),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    body, entries = b"", b""
    longer = sum(len(v) * (2 if kind == 3 else 4) for _, kind, v in tags if len(v) > 4 // kind + 1)
    for tag, kind, values in tags:
        if tag == 273:
            values = [start + longer]
        data = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(data) > 4:
            place = struct.pack(f"{order}I", start + len(body))
            body += data
        else:
            place = data.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + place
    assert len(body) == longer
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    count = struct.pack(f"{order}H", len(tags))
    return header + count + entries + b"\0" * 4 + body + pixels


def of_16(order: str, *values: int) -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


PNGS: dict[str, tuple[bytes, Any]] = {
    "1 bit": (png(1, 0, [b"\x40"]), [0, 255]),
    "2 bits": (png(2, 0, [b"\x60"]), [85, 170]),
    "4 bits": (png(4, 0, [b"\x5f"]), [85, 255]),
    "8 bits": (png(8, 0, [b"\x05\x09"]), [5, 9]),
    "16 bits": (png(16, 0, [of_16(">", 200 << 8, 65_535)]), [200, 255]),
    "1 bit, black is clear": (png(1, 0, [b"\x40"], tRNS=b"\0\0"), [255, 255]),
    "2 bits, 1 is clear": (png(2, 0, [b"\x60"], tRNS=b"\0\1"), [255, 170]),
    "8 bits, 5 is clear": (png(8, 0, [b"\x05\x09"], tRNS=b"\0\5"), [255, 9]),
    "16 bits, one is clear": (
        png(16, 0, [of_16(">", 100 << 8, 100 << 8 | 1)], tRNS=of_16(">", 100 << 8)),
        [255, 100],
    ),
    "grey and alpha": (png(8, 4, [bytes((100, 255, 100, 0))]), [100, 255]),
    "16-bit grey and alpha": (png(16, 4, [of_16(">", 25_600, 65_535, 25_600, 0)]), [100, 255]),
    "RGB": (png(8, 2, [bytes((1, 2, 3, 4, 5, 6))]), [(1, 2, 3), (4, 5, 6)]),
    "RGB, one is clear": (
        png(8, 2, [bytes((1, 2, 3, 4, 5, 6))], tRNS=of_16(">", 1, 2, 3)),
        [WHITE, (4, 5, 6)],
    ),
    "16-bit RGB": (
        png(16, 2, [of_16(">", 256, 512, 65_535, 0, 1, 51_200)]),
        [(1, 2, 255), (0, 0, 200)],
    ),
    "16-bit RGB, one is clear": (
        png(16, 2, [of_16(">", 256, 512, 65_535, 0, 1, 51_200)], tRNS=of_16(">", 256, 512, 65_535)),
        [WHITE, (0, 0, 200)],
    ),
    "RGBA": (
        png(8, 6, [bytes((10, 20, 30, 255, 10, 20, 30, 128))]),
        [(10, 20, 30), (132, 137, 142)],
    ),
    "16-bit RGBA": (
        png(16, 6, [of_16(">", 2_560, 5_120, 7_680, 65_535, 9, 9, 9, 0)]),
        [(10, 20, 30), WHITE],
    ),
    **{
        f"palette of {bits} bits": (
            png(bits, 3, [row], PLTE=bytes((10, 20, 30, 40, 50, 60)), tRNS=b"\xff\0"),
            [(10, 20, 30), WHITE],
        )
        for bits, row in ((1, b"\x40"), (2, b"\x10"), (4, b"\x01"), (8, b"\0\1"))
    },
    "palette, half clear": (
        png(8, 3, [b"\0\1"], PLTE=bytes((10, 20, 30, 40, 50, 60)), tRNS=b"\x80\xff"),
        [(132, 137, 142), (40, 50, 60)],
    ),
}


def tiffs(order: str) -> dict[str, tuple[bytes, Any]]:
    palette = [10 << 8, *[0] * 255, 20 << 8, *[0] * 255, 30 << 8, *[0] * 255]
    of_32 = struct.pack(f"{order}2I", 3, 255), struct.pack(f"{order}2I", 3 << 8, 65_535)
    half = of_16(order, 1_285, 2_570, 3_855, 32_896, 0, 0, 0, 0)
    return {
        "1 bit": (tiff(order, [1], 1, b"\x40"), [0, 255]),
        "1 bit, white is 0": (tiff(order, [1], 0, b"\x40"), [255, 0]),
        "8 bits": (tiff(order, [8], 1, b"\x05\xff"), [5, 255]),
        "8 bits, white is 0": (tiff(order, [8], 0, b"\x05\xff"), [250, 0]),
        "16 bits": (tiff(order, [16], 1, of_16(order, 200 << 8, 65_535)), [200, 255]),
        "32 bits, labels": (tiff(order, [32], 1, of_32[0], sample_format=2), [3, 255]),
        "32 bits": (tiff(order, [32], 1, of_32[1], sample_format=2), [3, 255]),
        "RGB": (tiff(order, [8] * 3, 2, bytes((1, 2, 3, 4, 5, 6))), [(1, 2, 3), (4, 5, 6)]),
        "16-bit RGB": (
            tiff(order, [16] * 3, 2, of_16(order, 256, 512, 65_535, 0, 1, 51_200)),
            [(1, 2, 255), (0, 0, 200)],
        ),
        "RGBA": (
            tiff(order, [8] * 4, 2, bytes((10, 20, 30, 128, 0, 0, 0, 0)), extra=2),
            [(132, 137, 142), WHITE],
        ),
        "RGBA, multiplied": (
            tiff(order, [8] * 4, 2, bytes((5, 10, 15, 128, 0, 0, 0, 0)), extra=1),
            [(132, 137, 142), WHITE],
        ),
        "16-bit RGBA, multiplied": (
            tiff(order, [16] * 4, 2, half, extra=1),
            [(132, 137, 142), WHITE],
        ),
        "grey and alpha": (tiff(order, [8] * 2, 1, bytes((90, 255, 90, 0)), extra=2), [90, 255]),
        "palette": (tiff(order, [8], 3, b"\0\1", colours=palette), [(10, 20, 30), (0, 0, 0)]),
        "palette and alpha": (
            tiff(order, [8] * 2, 3, bytes((0, 128, 1, 0)), extra=2, colours=palette),
            [(132, 137, 142), WHITE],
        ),
        "CMYK": (
            tiff(order, [8] * 4, 5, bytes((255, 0, 0, 0, 0, 0, 0, 255))),
            [(0, 255, 255), (0, 0, 0)],
        ),
        "16-bit CMYK": (
            tiff(order, [16] * 4, 5, of_16(order, 65_535, 0, 0, 0, 0, 0, 0, 65_535)),
            [(0, 255, 255), (0, 0, 0)],
        ),
    }


FILES = {
    **{f"PNG, {name}": each for name, each in PNGS.items()},
    **{f"TIFF II, {name}": each for name, each in tiffs("<").items()},
    **{f"TIFF MM, {name}": each for name, each in tiffs(">").items()},
    # Pillow reads these only in this order.
    "TIFF II, 16 bits, white is 0": (
        tiff("<", [16], 0, of_16("<", 200 << 8, 65_535)),
        [55, 0],
    ),
    "TIFF II, 12 bits": (tiff("<", [12], 1, bytes((0x80, 0x0F, 0xFF))), [128, 255]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_right_colours(name):
    file, expected = FILES[name]
    colours = np.array(expected)
    colours = colours if colours.ndim == 2 else np.repeat(colours[:, None], 3, axis=1)
    pixels = load_image(file, 2, "stretch")
    np.testing.assert_array_equal(pixels[0], colours)
    np.testing.assert_array_equal(pixels[1], colours)


def half_clear_palette() -> Image.Image:
    return Image.new("RGBA", (16, 16), (10, 20, 30, 128)).quantize(4)


# By mode: a picture, and its colour as RGB. Red in CIE Lab is from Pillow's own profile.
MODES: dict[str, tuple[Image.Image, tuple[int, int, int]]] = {
    "1": (Image.new("1", (16, 16), 1), WHITE),
    "L": (Image.new("L", (16, 16), 90), (90, 90, 90)),
    "LA": (Image.new("LA", (16, 16), (90, 128)), (172, 172, 172)),
    "La": (Image.new("La", (16, 16), (45, 128)), (172, 172, 172)),
    "P": (Image.new("RGB", (16, 16), (9, 99, 199)).quantize(2), (9, 99, 199)),
    "P, half clear": (half_clear_palette(), (132, 137, 142)),
    "RGB": (Image.new("RGB", (16, 16), (250, 0, 10)), (250, 0, 10)),
    "RGBX": (Image.new("RGBX", (16, 16), (1, 2, 3, 0)), (1, 2, 3)),
    "RGBA": (Image.new("RGBA", (16, 16), (10, 20, 30, 128)), (132, 137, 142)),
    "RGBa": (Image.new("RGBa", (16, 16), (5, 10, 15, 128)), (132, 137, 142)),
    "CMYK": (Image.new("CMYK", (16, 16), (0, 255, 0, 0)), (255, 0, 255)),
    "YCbCr": (Image.new("YCbCr", (16, 16), (76, 85, 255)), (254, 0, 0)),
    "LAB": (Image.new("LAB", (16, 16), (136, 208, 195)), (250, 3, 11)),
    "HSV": (Image.new("HSV", (16, 16), (85, 255, 255)), (0, 255, 0)),
    "I;16": (Image.new("I;16", (16, 16), 200 << 8), (200, 200, 200)),
    "I;16B": (Image.new("I;16B", (16, 16), 200 << 8), (200, 200, 200)),
    "I": (Image.new("I", (16, 16), 200 << 8), (200, 200, 200)),
}
# The formats that hold a mode as it is.
FORMATS = {
    "1": "tiff png bmp ppm tga ico pcx",
    "L": "tiff png jpeg webp bmp gif ppm jpeg2000 tga avif ico sgi pcx",
    "LA": "tiff png webp jpeg2000 tga avif ico",
    "P": "tiff png bmp gif tga ico pcx",
    "P, half clear": "png",
    "RGB": "tiff png bmp gif ppm jpeg2000 tga ico sgi pcx",
    "RGBA": "tiff png jpeg2000 tga avif ico sgi",
    "CMYK": "tiff jpeg jpeg2000",
    "YCbCr": "jpeg jpeg2000",
    "LAB": "tiff",
    "I;16": "tiff png ppm jpeg2000",
    "I;16B": "tiff",
    "I": "tiff ppm",
}


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_the_right_colour_in_memory_and_in_every_format(mode):
    image, colour = MODES[mode]
    assert image.mode == mode.split(",")[0]
    np.testing.assert_allclose(load_image(image, 16), np.broadcast_to(colour, (16, 16, 3)), atol=1)
    for kind in FORMATS.get(mode, "").split():
        pixels = load_image(encode(image, kind), 16).astype(int)
        assert np.abs(pixels - colour).max() <= 2, (kind, pixels[0, 0])


@pytest.mark.parametrize("mode", MODES)
def test_a_vision_tower_gets_the_same_colours(mode):
    image, colour = MODES[mode]
    pixels = preprocess(image, Preprocessing(size=None, mean=(0, 0, 0), std=(1, 1, 1), scale=1))
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, (16, 16, 3)), atol=1)


@pytest.mark.parametrize("read", [check_image, lambda source: load_image(source, 2)])
def test_floating_point_pixels_are_refused_by_the_header(read):
    file = tiff("<", [32], 1, struct.pack("<2f", 0.5, 1.0), sample_format=3)
    with pytest.raises(InputError, match="floating-point numbers of unknown range; save it with"):
        read(file)


# How a picture is turned, by EXIF orientation.
TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_every_orientation_is_applied_to_8_and_16_bits(orientation):
    values = np.arange(1, 5, dtype=np.uint8).reshape(2, 2) * 40
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = TURNED[orientation](values)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.uint16) << 8)):
        for kind in ("png", "tiff"):
            found = load_image(encode(image, kind, exif=exif), 2)
            np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "avif"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    file = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(file)), "n_frames", 1) == 3
    np.testing.assert_allclose(load_image(file, 8), np.broadcast_to((255, 0, 0), (8, 8, 3)), atol=3)


def test_the_clear_part_of_an_animation_is_white():
    frames = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGBA", (8, 8), "blue")]
    frames[0].paste((255, 0, 0, 255), (0, 0, 4, 8))
    pixels = load_image(encode(frames[0], "gif", save_all=True, append_images=frames[1:]), 8)
    assert (pixels[:, :4] == (255, 0, 0)).all() and (pixels[:, 4:] == 255).all()
