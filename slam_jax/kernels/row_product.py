"""A few rows times a kernel, in one pass over the kernel as it is stored.

XLA:CPU multiplies one row by a kernel of up to a few megabytes on one core, and copies a kernel
that is picked from a stack before it multiplies by it. It also makes a copy in float32 of a kernel
of fewer bits, or multiplies by it without vector instructions. Here the kernel is read in place, in
parts that are multiplied and added up in float32 to one part, whose rows are then summed; XLA
shares that pass out among the cores, and it takes as long as reading the kernel.

Kernels have the dtypes of `slam_jax.layers.quantized_array`. Each row is multiplied by itself: its
bits do not depend on the other rows.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from slam_jax.kernels.backend import on_cpu
from slam_jax.layers.precision import upcast
from slam_jax.layers.quantized_array import from_bits, is_quantized

# Each row is one pass over the kernel, so with more of them a copy in float32 is faster.
_FEW_ROWS = 8
# Parts of a kernel. With fewer and larger ones their total is larger, too; more take longer to
# compile.
_NUM_PARTS = 8
# Parts of a table, and the fewest columns of one, which fill a vector register.
_MOST_PARTS, _LEAST_COLUMNS = 64, 16


def quantized_product(x: Float[Array, "*B I"], kernel: Shaped[Array, "I O"]) -> Float[Array, "..."]:
    """x @ kernel of a quantised kernel, without its scales, in float32 or wider."""
    if not _has_few_rows(x):
        return plain_product(x, kernel)
    rows = x.reshape(-1, x.shape[-1]).astype(upcast(x.dtype))
    rows, kernel = jax.lax.optimization_barrier((rows, kernel))
    count = math.gcd(len(kernel), _NUM_PARTS)
    parts, total = kernel.reshape(count, -1, kernel.shape[-1]), jnp.zeros((), rows.dtype)
    factors = rows.reshape(len(rows), count, -1, 1)
    for i in range(count):
        total = total + factors[:, i] * from_bits(parts[i], rows.dtype)[None]
    ones = jnp.ones((len(rows), 1, total.shape[1]), total.dtype)
    return jnp.matmul(ones, total)[:, 0].reshape(*x.shape[:-1], -1)


def quantized_table_product(
    x: Float[Array, "*B D"], table: Shaped[Array, "V D"]
) -> Float[Array, "..."]:
    """x @ table.T of a quantised table, without its scales, in float32 or wider."""
    count = _num_table_parts(table.shape[-1])
    if count is None or not _has_few_rows(x):
        return plain_product(x, table.T)
    rows = x.reshape(-1, x.shape[-1]).astype(upcast(x.dtype))
    rows, table = jax.lax.optimization_barrier((rows, table))
    total = jnp.zeros((), rows.dtype)
    for part, columns in zip(jnp.split(rows, count, 1), jnp.split(table, count, 1), strict=True):
        total = total + part[:, None] * from_bits(columns, rows.dtype)[None]
    ones = jnp.ones((total.shape[-1], 1), total.dtype)
    return jnp.matmul(total, ones)[..., 0].reshape(*x.shape[:-1], -1)


def plain_product(x: Float[Array, "*B I"], kernel: Shaped[Array, "I O"]) -> Float[Array, "..."]:
    """The plain form of `quantized_product`: the kernel becomes float32 first."""
    kernel = from_bits(kernel, upcast(x.dtype))
    if on_cpu() and x.size:
        # XLA:CPU would make all kernels of a model float32 before its first product, and take ten
        # times as long for the memory. So a kernel waits for x, by a test that is never true.
        first = x.reshape(-1)[0]
        kernel = jnp.where((first > 0) & (first < 0), 0, kernel)
    return x.astype(kernel.dtype) @ kernel


def _has_few_rows(x: jax.Array) -> bool:
    return on_cpu() and 0 < math.prod(x.shape[:-1]) <= _FEW_ROWS


def _num_table_parts(width: int) -> int | None:
    """The number of parts into which the columns of a table are cut; None = its rows are too short
    or of an odd length."""
    blocks = width // _LEAST_COLUMNS
    if width % _LEAST_COLUMNS:
        return None
    return max(count for count in range(1, _MOST_PARTS + 1) if blocks % count == 0)


def picked_row_product(
    row: Float[Array, "I"], kernels: Shaped[Array, "E I O"], pick: Int[Array, ""]
) -> Float[Array, "O"]:
    """row @ kernels[pick], with sums in float32 or wider. Picks beyond the last take the last.

    The kernels may be quantised; scales are not applied.
    """
    num_kernels, inputs, outputs = kernels.shape
    if is_quantized(kernels):
        row, kernels = jax.lax.optimization_barrier((row, kernels))
    count = math.gcd(inputs, _NUM_PARTS)
    parts = kernels.reshape(num_kernels, count, -1, outputs)
    shape = (1, 1, inputs // count, outputs)
    starts = ((pick, i, 0, 0) for i in range(count))
    return _sum_of_parts(row, (jax.lax.dynamic_slice(parts, at, shape)[0, 0] for at in starts))


def plain_row_product(
    row: Float[Array, "I"], kernels: Shaped[Array, "E I O"], pick: Int[Array, ""]
) -> Float[Array, "O"]:
    """The plain form of `picked_row_product`."""
    return row @ from_bits(kernels[pick], upcast(row.dtype)).astype(row.dtype)


def _sum_of_parts(
    row: Float[Array, "I"], parts: Iterable[Shaped[Array, "J O"]]
) -> Float[Array, "O"]:
    parts = tuple(parts)
    factors = row.astype(upcast(row.dtype)).reshape(len(parts), -1, 1)
    total = jnp.zeros(parts[0].shape, factors.dtype)
    for factor, part in zip(factors, parts, strict=True):
        total += factor * from_bits(part, factors.dtype)
    return (jnp.ones((1, len(total)), total.dtype) @ total)[0].astype(row.dtype)
