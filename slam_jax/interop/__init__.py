"""Reads and writes weights in the formats of their publishers."""

from slam_jax.interop.preprocessing import load_preprocessing
from slam_jax.interop.pretrained import load_pretrained, save_pretrained
from slam_jax.interop.vision import load_vision, save_vision

__all__ = [
    "load_preprocessing",
    "load_pretrained",
    "load_vision",
    "save_pretrained",
    "save_vision",
]
