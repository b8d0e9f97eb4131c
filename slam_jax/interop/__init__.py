"""Weights in and out, in the forms that their publishers use."""

from slam_jax.interop.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
