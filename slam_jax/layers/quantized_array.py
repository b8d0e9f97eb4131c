"""Weights of fewer bits than they are computed with, for inference.

A quantised array is int8, times scales in float32, one for each output; or it is uint16, which are
the bits of numbers in bfloat16. XLA:CPU reads such bits several times faster than the dtype
bfloat16. Gradients do not pass through either.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Shaped, UInt16

_LARGEST = 127  # int8 has -128 too; without it the numbers are symmetric


def is_quantized(x: Any) -> bool:
    """Whether an array or a variable has one of the two dtypes, int8 and uint16."""
    return x.dtype in (np.dtype("int8"), np.dtype("uint16"))


def to_int8(
    x: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """The nearest numbers of int8, and their scales, which do not have `axes`: those that a product
    sums over. The largest number along `axes` becomes 127 or -127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / _LARGEST
    rounded = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    return rounded.astype(jnp.int8), jnp.squeeze(scale, axes)


def to_bits(x: Float[Array, "..."]) -> UInt16[Array, "..."]:
    """The bits of the numbers rounded to bfloat16."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def from_bits(x: Shaped[Array, "..."], dtype) -> Float[Array, "..."]:
    """A quantised array, or any other, as numbers of `dtype`, without scales."""
    if x.dtype == jnp.uint16:
        # bfloat16 is the first half of float32.
        x = jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(dtype)


def dequantize(
    x: Shaped[Array, "..."], scale: Float[Array, "..."] | None, axes: tuple[int, ...]
) -> Float[Array, "..."]:
    """The numbers of a quantised array in float32. scale, axes: as `to_int8` has them."""
    x = from_bits(x, jnp.float32)
    return x if scale is None else x * jnp.expand_dims(scale, axes)
