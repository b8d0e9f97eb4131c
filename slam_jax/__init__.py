"""SLAM v3 in JAX: any mix of text, image and vectors through four encoder processes that always
run side by side, one fused memory, and a decoder with multi-head latent attention.

    loaded = slam_jax.load("runs/quickstart")  # model, tokenizer, config, step
    [answer] = slam_jax.generate(loaded, [slam_jax.Request("shape of red", image="scene.png")])
    print(answer.text)

Layers stand alone in `slam_jax.layers`; the model's rooms are in `slam_jax.slam_v3`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from slam_jax.errors import ConfigError, UserError
from slam_jax.version import __version__

if TYPE_CHECKING:
    from slam_jax.generation import Request, Sampling, encode, generate, score, stream
    from slam_jax.layers import LatentCache, MultiHeadLatentAttention
    from slam_jax.slam_v3 import ImageConfig, Inputs, Memory, SlamV3, SlamV3Config
    from slam_jax.training import CheckpointError, load, train

# Loaded when first asked for: who takes one layer need not wait for data sets and checkpoints.
_ROOMS = {
    "generation": ("Request", "Sampling", "encode", "generate", "score", "stream"),
    "layers": ("LatentCache", "MultiHeadLatentAttention"),
    "slam_v3": ("ImageConfig", "Inputs", "Memory", "SlamV3", "SlamV3Config"),
    "training": ("CheckpointError", "load", "train"),
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ImageConfig",
    "Inputs",
    "LatentCache",
    "Memory",
    "MultiHeadLatentAttention",
    "Request",
    "Sampling",
    "SlamV3",
    "SlamV3Config",
    "UserError",
    "__version__",
    "encode",
    "generate",
    "load",
    "score",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"slam_jax.{room}"), name)
    raise AttributeError(f"module 'slam_jax' has no attribute {name!r}")
