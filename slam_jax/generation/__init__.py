"""From a model and a prompt to new tokens."""

from slam_jax.generation.decode import greedy_decode

__all__ = ["greedy_decode"]
