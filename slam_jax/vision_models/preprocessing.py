"""From a picture to the pixels that a vision tower was trained with."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from slam_jax.errors import InputError, require, require_count
from slam_jax.vision_models.colours import as_rgb
from slam_jax.vision_models.config import VisionConfig

_MOST_PIXELS = 64_000_000  # a long thin picture would become far larger than its file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a publisher prepares pictures, in this order.

    size: (height, width) that a picture is resized to; a number = its shorter side, with
      proportions kept; None = not resized. resample: the filter.
    crop: (height, width) cut from the centre, black where the picture is smaller; None = not cut.
    scale: factor of the values 0 to 255.
    mean, std: of each channel; the first is subtracted, the second divides.

    Raises ConfigError for a value that cannot be used.
    """

    size: int | tuple[int, int] | None
    resample: Image.Resampling = Image.Resampling.BICUBIC
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        object.__setattr__(self, "resample", Image.Resampling(self.resample))
        size = (self.size,) if isinstance(self.size, int) else self.size
        for field, sides in (("size", size), ("crop", self.crop)):
            for side in sides or ():
                require_count(field, side, most=1 << 13)
        require(0 < self.scale < 1e30, "scale", self.scale, "a number above 0")
        for field in ("mean", "std"):
            values = getattr(self, field)
            usable = len(values) == 3 and all(abs(value) < 1e30 for value in values)
            require(usable, field, values, "three numbers, one for each channel")
        require(min(self.std) > 0, "std", self.std, "numbers above 0")


def published_preprocessing(config: VisionConfig) -> Preprocessing:
    """What the publisher of a kind of tower uses, for a folder that does not say it.

    ViT and SigLIP squash a picture to the square `image_size`, bilinearly and bicubically. CLIP
    resizes the shorter side to it and cuts out the centre. DINOv2 resizes to 256 and cuts out 224,
    although its positions were learned for 518 pixels.
    """
    side = config.image_size
    if config.model_type == "vit":
        return Preprocessing(size=(side, side), resample=Image.Resampling.BILINEAR)
    if config.model_type == "siglip_vision_model":
        return Preprocessing(size=(side, side))
    if config.model_type == "clip_vision_model":
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return Preprocessing(size=side, crop=(side, side), mean=mean, std=std)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Preprocessing(size=256, crop=(224, 224), mean=mean, std=std)


def preprocess(picture: Image.Image | np.ndarray, how: Preprocessing) -> Float[np.ndarray, "H W 3"]:
    """The normalised float32 pixels of a picture.

    Other modes become RGB as `as_rgb` does. Source: the order and rounding are those of the image
    processors of transformers that use Pillow.

    Args:
      picture: a PIL image, or uint8 [H, W, 3], [H, W, 4] or [H, W].

    Raises:
      InputError: `picture` is something else, would become larger than 64 megapixels, or has
        pixels that `as_rgb` refuses.
    """
    pixels = fit_picture(_to_rgb(picture), how)
    scaled = (pixels.astype(np.float64) * how.scale).astype(np.float32)
    return (scaled - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)


def fit_picture(image: Image.Image, how: Preprocessing) -> UInt8[np.ndarray, "H W 3"]:
    """An RGB picture, resized and cropped.

    Raises InputError where it would become larger than 64 megapixels.
    """
    if how.size is not None:
        height, width = _resized(image, how.size)
        if height * width > _MOST_PIXELS:
            found = f"{image.height} x {image.width} pixels would become {height:,} x {width:,}"
            raise InputError(f"{found}; expected a picture that is less long and thin")
        image = image.resize((width, height), how.resample)
    pixels = np.asarray(image)
    return pixels if how.crop is None else _crop(pixels, how.crop)


def _to_rgb(picture: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2:] in ((), (3,), (4,))
        if picture.dtype != np.uint8 or picture.ndim < 2 or not channels or 0 in picture.shape:
            found = f"{picture.dtype}{list(picture.shape)}"
            raise InputError(f"an array of {found} is no picture; expected uint8 [H, W, 3]")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        found = type(picture).__name__
        raise InputError(f"a {found} is no picture; expected a PIL image or uint8 [H, W, 3]")
    if 0 in picture.size:
        raise InputError(f"a picture of {picture.height} x {picture.width} pixels is empty")
    return as_rgb(picture)


def _resized(image: Image.Image, size: int | tuple[int, int]) -> tuple[int, int]:
    """The height and width after resizing."""
    if not isinstance(size, int):
        return size
    longer = int(size * max(image.size) / min(image.size))
    return (longer, size) if image.width <= image.height else (size, longer)


def _crop(pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The centre; where the picture is smaller, black on both sides, first on top and left."""
    missing = [max(wanted - side, 0) for wanted, side in zip(size, pixels.shape[:2], strict=True)]
    padded = np.pad(pixels, [((n + 1) // 2, n // 2) for n in missing] + [(0, 0)])
    top, left = ((side - wanted) // 2 for wanted, side in zip(size, padded.shape[:2], strict=True))
    return padded[top : top + size[0], left : left + size[1]]
