"""Random changes of the pictures of a training example."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from slam_jax.data.config import DataConfig

Picture = UInt8[np.ndarray, "H W 3"]


def augment(
    pictures: Sequence[Picture], config: DataConfig, rng: np.random.Generator
) -> list[Picture]:
    """The pictures of one example, changed as `config.augment`, `flip` and `colour` say.

    Each is cropped by itself. They are mirrored together, and their colours are changed alike, so
    that they can still be compared. What is 0 draws nothing from `rng`.
    """
    changed = list(pictures)
    if config.augment:
        changed = [crop_at_random(pixels, rng, config.augment) for pixels in changed]
    if config.flip and rng.random() < config.flip:
        changed = [np.ascontiguousarray(pixels[:, ::-1]) for pixels in changed]
    if config.colour:
        brightness, contrast, saturation = (1 + config.colour * rng.uniform(-1, 1, 3)).tolist()
        changed = [change_colours(x, brightness, contrast, saturation) for x in changed]
    return changed


def crop_at_random(pixels: Picture, rng: np.random.Generator, max_share: float) -> Picture:
    """Cuts up to `max_share` off each side length at a random place and resizes to [H, W]."""
    height, width = pixels.shape[:2]
    scale = 1 - max_share * rng.random()
    x, y = (rng.random(2) * (1 - scale) * (width, height)).tolist()
    box = (x, y, x + scale * width, y + scale * height)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.array(image)


def change_colours(
    pixels: Picture, brightness: float, contrast: float, saturation: float
) -> Picture:
    """Brightness, contrast and saturation multiplied by factors, in this order; 1 = unchanged.

    Contrast is the difference to the mean grey of the picture, and saturation that to the grey of
    each pixel, as in `PIL.ImageEnhance`.
    """
    image = ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    return np.array(ImageEnhance.Color(image).enhance(saturation))
