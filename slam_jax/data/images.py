"""Pictures as they come, of any size and kind, to the pixels a model reads."""

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from slam_jax.errors import InputError, first_line

MOST_PIXELS = 64_000_000
"""Of a picture before it is resized: a small file may hold billions, which would be allocated."""

_GREY = (128, 128, 128)
_opening = threading.Lock()  # warnings are switched off for the whole process


def load_image(source: Any, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The picture in `size` x `size` pixels, its proportions kept, what is left over grey.

    Turned as its camera says; transparency is laid on white; of an animation the first frame.

    Args:
      source: a path, the bytes of a file, a PIL image, or an array of bytes [H, W], [H, W, 3] or
        [H, W, 4].

    Raises:
      InputError: it is no picture, cannot be read, or has more than `MOST_PIXELS`.
    """
    if isinstance(source, np.ndarray) and source.shape == (size, size, 3):
        return _pixels(source)
    with _opened(source) as image:
        return _fit(image, size, source)


def crop_at_random(
    pixels: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator, most: float
) -> UInt8[np.ndarray, "H W 3"]:
    """A window of the picture, brought back to its size; up to `most` of each side is lost."""
    height, width = pixels.shape[:2]
    scale = 1 - most * rng.random()
    x, y = (rng.random(2) * (1 - scale) * (width, height)).tolist()
    box = (x, y, x + scale * width, y + scale * height)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.array(image)


def check_image(source: Any) -> tuple[int, int]:
    """Width and height, without decoding it; raises as `load_image` for what that can tell."""
    with _opened(source) as image:
        return image.size


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    with contextlib.ExitStack() as stack:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, os.PathLike, bytes)):
            image = stack.enter_context(_open_file(source))
        elif hasattr(source, "__array__"):
            image = Image.fromarray(_pixels(np.asarray(source)))
        else:
            raise InputError(
                f"a {type(source).__name__} is no picture; "
                "give a path, bytes, a PIL image or an array"
            )
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise InputError(
                f"{_name(source)} has {width:,} x {height:,} pixels; "
                f"at most {MOST_PIXELS:,} are read: make it smaller"
            )
        yield image


def _open_file(source: str | os.PathLike[str] | bytes) -> Image.Image:
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    try:
        # Pillow's own bound lies higher; it warns of it before ours is seen.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file)
    except Image.DecompressionBombError:
        raise InputError(
            f"{_name(source)} has more pixels than the {MOST_PIXELS:,} that are read: "
            "make it smaller"
        ) from None
    except Exception as error:  # each format's reader has errors of its own
        raise _unreadable(source, error) from error


def _fit(image: Image.Image, size: int, source: Any) -> Any:
    try:
        if image is not source:  # what somebody gave is not changed
            image.draft("RGB", (size, size))  # a JPEG is decoded no larger than needed
        image = _to_rgb(ImageOps.exif_transpose(image))
        if image.size != (size, size):
            image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=_GREY)
        return np.array(image)
    except Exception as error:
        raise _unreadable(source, error) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are fractions of no known range")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _pixels(array: np.ndarray) -> np.ndarray:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not fits or 0 in array.shape:
        raise InputError(
            f"an array of {array.dtype}{list(array.shape)} is no picture; "
            "expected uint8 [height, width, 3]"
        )
    return array


def _unreadable(source: Any, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{_name(source)}: no such file")
    if isinstance(error, Image.UnidentifiedImageError):
        return InputError(f"{_name(source)} is no picture of a known kind, such as PNG or JPEG")
    return InputError(f"{_name(source)} cannot be read as a picture ({first_line(error)})")


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "the picture"
