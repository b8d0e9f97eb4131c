"""Reading pictures of any size and format as square uint8 RGB arrays."""

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
from PIL import ExifTags, Image

from slam_jax.errors import InputError, first_line
from slam_jax.vision_models.colours import as_rgb, check_mode
from slam_jax.vision_models.preprocessing import Preprocessing, fit_picture

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded: a file of a few kilobytes can hold billions of pixels."""

RESIZE_POLICIES = ("letterbox", "crop", "stretch")
"""How a picture becomes square: "letterbox" scales its longer side and fills up with grey; "crop"
scales its shorter side and cuts out the centre; "stretch" scales both, without keeping proportions.
"""

# Pillow gives EPS, which is a program, to Ghostscript, and WMF to Windows.
_PROGRAMS = ("EPS", "WMF")
_GREY = (128, 128, 128)
_EXIF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_warnings_lock = threading.Lock()  # warning filters are global to the process


def load_image(
    source: Any, size: int, how: Preprocessing | str | None = None
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Returns the picture as `size` x `size` RGB pixels.

    The EXIF orientation is applied, an animation gives its first frame, and modes, bit depths and
    transparency are handled as `as_rgb` does.

    Args:
      source: a path, the bytes of a file, a PIL image, or a uint8 array [H, W], [H, W, 3] or
        [H, W, 4].
      how: one of `RESIZE_POLICIES`; None = the first. Or as the publisher of a vision tower does.

    Raises:
      InputError: `source` is no picture, cannot be decoded, has more than `MAX_PIXELS` pixels,
        integers outside 0..65535 or floating-point pixels.
    """
    if isinstance(source, np.ndarray) and source.shape == (size, size, 3):
        return _check_array(source)
    with _open(source) as image:
        try:
            if isinstance(how, Preprocessing):
                return fit_picture(_to_rgb(image), how)
            if image is not source:  # draft() changes the image in place
                image.draft("RGB", (size, size))  # a JPEG is decoded no larger than needed
            return np.array(_fit(_to_rgb(image), size, how or RESIZE_POLICIES[0]))
        except Exception as error:
            raise _unreadable(source, error) from error


def check_image(source: Any) -> tuple[int, int]:
    """Returns width and height from the header alone; raises as `load_image` for a bad header."""
    with _open(source) as image:
        try:
            check_mode(image)
        except InputError as error:
            raise _unreadable(source, error) from None
        return image.size


def as_pictures(image: Any) -> tuple[Any, ...]:
    """The pictures of a row or a request, which has none (None), one, or a sequence of them."""
    if image is None:
        return ()
    return tuple(image) if isinstance(image, (list, tuple)) else (image,)


@contextlib.contextmanager
def _open(source: Any) -> Iterator[Image.Image]:
    with contextlib.ExitStack() as stack:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, os.PathLike, bytes)):
            image = stack.enter_context(_open_file(source))
        elif hasattr(source, "__array__"):
            image = Image.fromarray(_check_array(np.asarray(source)))
        else:
            raise InputError(
                f"a {type(source).__name__} is no picture; "
                "give a path, bytes, a PIL image or an array"
            )
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(source, f"{image.width:,} x {image.height:,}")
        yield image


def _open_file(source: str | os.PathLike[str] | bytes) -> Image.Image:
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    try:
        # Pillow warns at a bound of its own, above MAX_PIXELS, before ours can be checked.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
    except Image.DecompressionBombError:
        raise _too_large(source, "far too many") from None
    except Exception as error:  # the reader of each format has its own error types
        raise _unreadable(source, error) from error
    if image.format in _PROGRAMS:
        image.close()
        raise InputError(f"{_name(source)} is a drawing ({image.format}); give a PNG or JPEG of it")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    rgb = as_rgb(image)
    orientation = _orientation(image)  # a TIFF has applied its own by now and removed the tag
    return rgb if orientation is None else rgb.transpose(orientation)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What EXIF asks for, if anything. Malformed tags count as none."""
    try:  # not ImageOps.exif_transpose, which also writes EXIF back and fails for malformed tags
        return _EXIF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # struct.error, SyntaxError, TypeError and others
        return None


def _fit(image: Image.Image, size: int, resize: str) -> Image.Image:
    if image.size == (size, size):
        return image
    if resize == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if resize == "crop":
        side = min(image.size)
        left, top = ((whole - side) / 2 for whole in image.size)
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    # The longer side becomes `size`, the shorter one at least one pixel.
    width, height = (max(1, round(side / max(image.size) * size)) for side in image.size)
    canvas = Image.new("RGB", (size, size), _GREY)
    corner = (round((size - width) / 2), round((size - height) / 2))
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), corner)
    return canvas


def _check_array(array: np.ndarray) -> np.ndarray:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not fits or 0 in array.shape:
        raise InputError(
            f"an array of {array.dtype}{list(array.shape)} is no picture; "
            "expected uint8 [height, width, 3]"
        )
    return array


def _too_large(source: Any, pixels: str) -> InputError:
    return InputError(
        f"{_name(source)} has {pixels} pixels; at most {MAX_PIXELS:,} are read: make it smaller"
    )


def _unreadable(source: Any, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{_name(source)}: no such file")
    if isinstance(error, Image.UnidentifiedImageError):
        return InputError(f"{_name(source)} is no picture of a known kind, such as PNG or JPEG")
    return InputError(f"{_name(source)} cannot be read as a picture ({first_line(error)})")


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "the picture"
