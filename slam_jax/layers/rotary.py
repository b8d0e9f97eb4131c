"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "*B T N H"], positions: Int[Array, "*#B T"], base: float = 10_000.0
) -> Float[Array, "*B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) by positions * base^(-2i/H); position 0 is the identity.

    Angles are float32 and the result has the dtype of `x`. H must be even.
    Source: Su et al. 2021, "RoFormer", section 3.2.2 (in the half-split layout of GPT-NeoX).
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
