"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slam_jax.layers.precision import upcast


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32 or wider.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", section 4.
    """

    def __init__(
        self, dim: int, *, epsilon: float = 1e-6, init_scale: float = 1.0, param_dtype=jnp.float32
    ):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.full((dim,), init_scale, param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = x.astype(upcast(x.dtype))
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.epsilon)
        scale = jax.lax.broadcast_to_rank(self.scale[...].astype(h.dtype), h.ndim)
        return (h * scale).astype(x.dtype)
