"""Reads and writes how publishers prepare pictures, in preprocessor_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from slam_jax.interop.fields import Group
from slam_jax.interop.vision_formats import (
    VISION_FORMATS,
    group_of,
    read_vision_config,
    require_known,
)
from slam_jax.interop.weights import find_folder, read_json
from slam_jax.vision_models import Preprocessing, VisionConfig, published_preprocessing

PREPROCESSING = "preprocessor_config.json"
# Fields of preprocessor_config.json that change no pixel.
_HARMLESS = (
    *("_valid_processor_keys", "data_format", "do_convert_rgb", "feature_extractor_type"),
    *("image_processor_type", "input_data_format", "processor_class", "return_tensors"),
)


def load_preprocessing(folder: str | Path) -> Preprocessing:
    """How pictures are prepared for the tower in a folder, by its preprocessor_config.json.

    Without this file it is `published_preprocessing`, which knows the model type.

    Raises:
      InputError, ConfigError: a file cannot be read, or has a field that is not understood.
    """
    folder = find_folder(folder)
    config = read_vision_config(read_json(folder / "config.json"))
    if not (folder / PREPROCESSING).exists():
        return published_preprocessing(config)
    return _read_preprocessing(read_json(folder / PREPROCESSING), config)


def _read_preprocessing(data: Any, config: VisionConfig) -> Preprocessing:
    group, default = group_of(data, PREPROCESSING), published_preprocessing(config)
    fields = ("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std")
    steps = ("resize", "center_crop", "rescale", "normalize")
    require_known(group, {*fields, *(f"do_{step}" for step in steps), *_HARMLESS})
    resize, crop, rescale, normalize = (
        group.get(f"do_{step}", bool, step != "center_crop" or default.crop is not None)
        for step in steps
    )
    resample = group.get("resample", int, int(default.resample))
    if resample not in list(Image.Resampling):
        raise group.wrong("resample", "a filter of Pillow, 0 to 5")
    values: dict[str, Any] = dict(size=None, crop=None, scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    if resize:
        values["size"] = _read_size(group, "size", default.size, config.model_type == "vit")
    if crop:
        values["crop"] = _read_size(group, "crop_size", default.crop, True)
    if rescale:
        values["scale"] = group.get("rescale_factor", float, default.scale)
    if normalize:
        values |= {name: _read_channels(group, f"image_{name}") for name in ("mean", "std")}
    return Preprocessing(resample=Image.Resampling(resample), **values)


def _read_size(group: Group, key: str, default: Any, square: bool) -> Any:
    """square: whether a number is both sides, not the shorter one."""
    value = group.data.get(key)
    if value is None:
        return default
    if not isinstance(value, Mapping):
        side = group.get(key, int)
        return (side, side) if square else side
    inner = Group(value, f"{key}.", group.file)
    if value.keys() == {"height", "width"}:
        return inner.get("height", int), inner.get("width", int)
    if value.keys() != {"shortest_edge"} or key == "crop_size":
        raise group.wrong(key, "a number, height and width, or for `size` shortest_edge")
    return inner.get("shortest_edge", int)


def _read_channels(group: Group, key: str) -> tuple[float, ...]:
    """A file has to say them: some publishers' defaults are those of other models."""
    value = group.data.get(key)
    if not isinstance(value, list) or len(value) != 3:
        raise group.wrong(key, "three numbers")
    inner = Group({str(i): number for i, number in enumerate(value)}, f"{key}.", group.file)
    return tuple(inner.get(str(i), float) for i in range(3))


def write_preprocessing(how: Preprocessing, config: VisionConfig) -> dict[str, Any]:
    def size(sides: Any) -> dict[str, int]:
        return {"height": sides[0], "width": sides[1]}

    data = {
        "image_processor_type": VISION_FORMATS[config.model_type].processor,
        "do_resize": how.size is not None,
        "resample": int(how.resample),
        "do_center_crop": how.crop is not None,
        "do_rescale": True,
        "rescale_factor": how.scale,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
        "do_convert_rgb": True,
    }
    if how.size is not None:
        shorter = isinstance(how.size, int)
        data["size"] = {"shortest_edge": how.size} if shorter else size(how.size)
    if how.crop is not None:
        data["crop_size"] = size(how.crop)
    return data
