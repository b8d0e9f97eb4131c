"""Reads and writes published vision towers.

Model types are vit, dinov2, dinov2_with_registers, clip_vision_model and siglip_vision_model, and
clip and siglip, of which only the vision tower is read.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from slam_jax.interop.filling import fill, main_dtype
from slam_jax.interop.preprocessing import PREPROCESSING, write_preprocessing
from slam_jax.interop.pretrained import Published, write_folder
from slam_jax.interop.vision_formats import (
    VISION_FORMATS,
    read_vision_config,
    vision_layout,
    write_vision_config,
)
from slam_jax.interop.weights import (
    Weights,
    find_folder,
    find_weights,
    read_json,
    require_as_many,
)
from slam_jax.vision_models import Preprocessing, VisionConfig, VisionTower

# Weights beside those of a tower, by the first part of their names.
_BESIDE = {
    "text_model": "the text tower",
    "text_projection": "the text projection",
    "visual_projection": "the projection of the class token",
    "logit_scale": "the scale of logits",
    "logit_bias": "the bias of logits",
    "head": "the pooling head",
    "pooler": "the pooling head",
    "classifier": "the classifier",
}
# Not worth a notice: the token of masked pre-training, and the numbers 0, 1, 2, ...
_UNUSED = (".mask_token", ".position_ids")


def load_vision(
    folder: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    scan_layers: bool | None = None,
    mesh: Mesh | None = None,
    check_finite: bool = True,
) -> tuple[VisionTower, VisionConfig]:
    """The vision tower in a folder downloaded from the hub, and its configuration.

    Text towers, heads and the token of masked pre-training are not read; one warning names those
    that the folder has. The arguments are those of `load_pretrained`.

    Raises:
      InputError, ConfigError: as `load_pretrained`.
    """
    found = open_vision(folder)
    own: Any = dict(param_dtype=param_dtype or found.config.param_dtype)
    config = dataclasses.replace(found.config, dtype=dtype, scan_layers=scan_layers, **own)
    tower = fill(
        lambda: VisionTower(config, rngs=nnx.Rngs(0)),
        found.layout_of,
        found.source,
        param_dtype=param_dtype,
        mesh=mesh,
        check_finite=check_finite,
    )
    return tower, config


def open_vision(folder: str | Path) -> Published:
    """The vision tower in a folder of the hub; only headers are read.

    Raises InputError and ConfigError as `load_vision` does.
    """
    folder = find_folder(folder)
    config = read_vision_config(read_json(folder / "config.json"))
    prefix, weights = _of_tower(find_weights(folder), VISION_FORMATS[config.model_type].name)
    config = dataclasses.replace(config, param_dtype=main_dtype(weights))
    require_as_many(weights, config, "num_layers")
    return Published(config, weights, lambda shapes: vision_layout(config, shapes, prefix))


def save_vision(
    tower: VisionTower,
    folder: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a vision tower as its publisher would, without heads; see `save_pretrained`.

    preprocessing: None = no preprocessor_config.json is written.
    """
    texts = {"config.json": write_vision_config(tower.config)}
    if preprocessing is not None:
        texts[PREPROCESSING] = write_preprocessing(preprocessing, tower.config)
    write_folder(
        folder,
        tower,
        lambda params: vision_layout(tower.config, params),
        texts,
        max_shard_bytes=max_shard_bytes,
    )


def _of_tower(weights: Weights, name: str) -> tuple[str, Weights]:
    """What is before the names of the tower's tensors, and the weights without those beside it."""
    inside = any(key.startswith(f"{name}.embeddings.") for key in weights.stored)
    prefix = f"{name}." if inside else ""
    stored, beside = {}, {}
    for key, found in weights.stored.items():
        part = key.removeprefix(prefix).split(".")[0]
        if part in _BESIDE:
            beside[_BESIDE[part]] = None
        elif not key.endswith(_UNUSED):
            stored[key] = found
    if beside:
        skipped = ", ".join(sorted(beside))
        logging.getLogger("slam_jax").warning(
            "%s: only the vision tower is read, not %s", weights.name, skipped
        )
    return prefix, dataclasses.replace(weights, stored=stored)
