"""One row times a kernel, in one pass over the kernel.

XLA:CPU multiplies one row by a kernel of up to a few megabytes on one core, and copies a kernel
that is picked from a stack before it multiplies by it. Here the kernel is read in place, in parts
that are added up to one, whose rows are then summed; XLA shares that pass out among the cores.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Parts of a kernel. With fewer and larger ones their total is larger, too.
_NUM_PARTS = 16


def row_product(row: Float[Array, "I"], kernel: Float[Array, "I O"]) -> Float[Array, "O"]:
    """row @ kernel, with sums in float32 or wider."""
    count = math.gcd(len(kernel), _NUM_PARTS)
    return _sum_of_parts(row, kernel.reshape(count, -1, kernel.shape[-1]))


def picked_row_product(
    row: Float[Array, "I"], kernels: Float[Array, "E I O"], pick: Int[Array, ""]
) -> Float[Array, "O"]:
    """row @ kernels[pick], with sums in float32 or wider. Picks beyond the last take the last."""
    num_kernels, inputs, outputs = kernels.shape
    count = math.gcd(inputs, _NUM_PARTS)
    parts = kernels.reshape(num_kernels, count, -1, outputs)
    shape = (1, 1, inputs // count, outputs)
    starts = ((pick, i, 0, 0) for i in range(count))
    return _sum_of_parts(row, (jax.lax.dynamic_slice(parts, at, shape)[0, 0] for at in starts))


def plain_row_product(
    row: Float[Array, "I"], kernels: Float[Array, "E I O"], pick: Int[Array, ""]
) -> Float[Array, "O"]:
    """The plain form of `picked_row_product`."""
    return row @ kernels[pick]


def _sum_of_parts(
    row: Float[Array, "I"], parts: Iterable[Float[Array, "J O"]]
) -> Float[Array, "O"]:
    parts = tuple(parts)
    factors = row.astype(jnp.promote_types(row.dtype, jnp.float32)).reshape(len(parts), -1, 1)
    total = jnp.zeros(parts[0].shape, factors.dtype)
    for factor, part in zip(factors, parts, strict=True):
        total += factor * part
    return (jnp.ones((1, len(total)), total.dtype) @ total)[0].astype(row.dtype)
