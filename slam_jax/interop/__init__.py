"""Reads and writes weights in the formats of their publishers."""

from slam_jax.interop.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
