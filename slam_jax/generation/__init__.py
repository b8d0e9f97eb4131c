"""Decoding: the loop on the device, and the same with text in and out."""

from slam_jax.generation.answer import answer
from slam_jax.generation.decode import greedy_decode

__all__ = ["answer", "greedy_decode"]
