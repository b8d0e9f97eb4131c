"""Pictures of any mode and bit depth as 8-bit RGB."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from slam_jax.errors import InputError

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, (0, (0,))  # tags of TIFF
# Pillow makes 8 bits of the pixels of a PNG, but not of the colour that counts as transparent.
_CLEAR_VALUES: dict[str | None, Callable[[Any], Any]] = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda colour: tuple(value >> 8 for value in colour),
}
_SCALED_BY_PILLOW = ("PPM", "PNG")  # to 0..65535, also where Pillow gives 32 bits


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB. Transparent pixels are blended with white.

    16-bit values are divided by 256, 12-bit ones by 16. So are 32-bit integers by 256, unless all
    of them are below 256, as in masks and label maps.

    Raises:
      InputError: it has floating-point pixels, whose range is unknown, or integers outside
        0..65535.
    """
    tiles = getattr(image, "tile", ())  # empty once it is decoded
    raw_mode = tiles[0].args if image.format == "PNG" and tiles else None
    image.load()
    check_mode(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image)
    if image.mode == "La":  # Pillow converts it to no other mode
        image = image.convert("LA")
    if raw_mode in _CLEAR_VALUES and (clear := image.info.get("transparency")) is not None:
        image = image.copy()
        image.info["transparency"] = _CLEAR_VALUES[raw_mode](clear)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raises InputError for floating-point pixels, which the header tells."""
    if image.mode == "F":
        raise InputError(
            "its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits"
        )


def _from_integers(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits."""
    values, tags = np.asarray(image, np.int64), getattr(image, "tag_v2", {})
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise InputError(f"its values are {low}..{high}; expected 0..255 or 0..65535")
    clear: Any = image.info.get("transparency")
    is_clear = values == clear if isinstance(clear, int) else np.zeros(values.shape, bool)
    if image.mode != "I" and tags.get(_PHOTOMETRIC) in _WHITE_IS_ZERO:
        values = 65_535 - values  # Pillow does it up to 8 bits
    if image.mode != "I" and tags.get(_BITS_PER_SAMPLE) == (12,):
        values >>= 4
    elif image.mode != "I" or image.format in _SCALED_BY_PILLOW or high > 255:
        values >>= 8
    grey = np.where(is_clear, 255, values).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
