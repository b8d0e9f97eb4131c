"""SLAM v3 in JAX: a multimodal transformer that reads any mix of text, image and vectors.

Four encoder processes run in parallel on every input, their outputs are fused into one memory, and
a decoder with multi-head latent attention generates text.

    loaded = slam_jax.load("runs/quickstart")  # model, tokenizer, config, step
    [answer] = slam_jax.generate(loaded, [slam_jax.Request("shape of red", image="scene.png")])
    print(answer.text)

Layers are in `slam_jax.layers`, the parts of the model in `slam_jax.slam_v3`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from slam_jax.errors import ConfigError, InputError, UserError
from slam_jax.version import __version__

if TYPE_CHECKING:
    from slam_jax.generation import Request, Sampling, encode, generate, score, stream
    from slam_jax.layers import LatentCache, MultiHeadLatentAttention
    from slam_jax.layers.quantization import quantize
    from slam_jax.slam_v3 import ImageConfig, Inputs, Memory, SlamV3, SlamV3Config
    from slam_jax.trained.saving import save_pretrained
    from slam_jax.training import CheckpointError, load, train

# Imported on first use, so that importing one layer does not import data sets and checkpoints.
_PACKAGES = {
    "generation": ("Request", "Sampling", "encode", "generate", "score", "stream"),
    "layers": ("LatentCache", "MultiHeadLatentAttention"),
    "layers.quantization": ("quantize",),
    "slam_v3": ("ImageConfig", "Inputs", "Memory", "SlamV3", "SlamV3Config"),
    "trained.saving": ("save_pretrained",),
    "training": ("CheckpointError", "load", "train"),
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ImageConfig",
    "InputError",
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
    "quantize",
    "save_pretrained",
    "score",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    for package, names in _PACKAGES.items():
        if name in names:
            return getattr(importlib.import_module(f"slam_jax.{package}"), name)
    raise AttributeError(f"module 'slam_jax' has no attribute {name!r}")
