"""Each group of rows times the kernel of its group: the product of a mixture of experts."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from slam_jax.kernels.backend import cuda_capability, has_tokamax, on_cpu, portable
from slam_jax.kernels.row_product import picked_row_product
from slam_jax.layers.precision import upcast
from slam_jax.layers.quantized_array import from_bits, is_quantized

# With so few rows, one product a row that reads its kernel in place is faster.
_FEW_ROWS = 8
_SMALLEST_BLOCK = 32


def grouped_matmul(
    x: Float[Array, "rows I"], kernels: Shaped[Array, "E I O"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows O"]:
    """y[r] = x[r] @ kernels[g] for each row r of group g; 0 for rows after the last group.

    Rows are sorted by group; group_sizes are the numbers of rows of each. `ragged_dot` on
    accelerators. On a CPU that multiplies every row by every kernel, so a loop over blocks of rows
    takes its place there; it supports reverse-mode differentiation only. Kernels may be quantised
    (`slam_jax.layers.quantized_array`); scales are not applied.
    """
    return _on_cpu(x, kernels, group_sizes) if on_cpu() else ragged_dot(x, kernels, group_sizes)


def ragged_dot(
    x: Float[Array, "rows I"], kernels: Shaped[Array, "E I O"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows O"]:
    """The plain form of `grouped_matmul`, which reads the kernels in place: `ragged_dot` of tokamax
    on TPUs and Hopper GPUs, where its kernels have gradients, else of `jax.lax`."""
    in_group = jnp.arange(len(x))[:, None] < group_sizes.sum()
    # The libraries promise nothing about other rows, in the product and in its gradients.
    x, kernels = jnp.where(in_group, x, 0), _widened(kernels, x.dtype)
    has_kernel = jax.default_backend() == "tpu" or 9.0 <= cuda_capability() < 10.0
    has_kernel &= has_tokamax() and not portable()
    library: Any = importlib.import_module("tokamax") if has_kernel else jax.lax
    y = library.ragged_dot(x, kernels, group_sizes)
    return jnp.where(in_group, y, 0)


@jax.custom_vjp
def _on_cpu(x, kernels, group_sizes):
    if len(x) > _FEW_ROWS:
        return _by_blocks(x, kernels, group_sizes)
    groups = jnp.sum(jnp.arange(len(x))[:, None] >= jnp.cumsum(group_sizes)[None], axis=-1)
    rows = [picked_row_product(row, kernels, group) for row, group in zip(x, groups, strict=True)]
    return jnp.where(groups[:, None] < len(kernels), jnp.stack(rows), 0)


def _by_blocks(x, kernels, group_sizes, transposed=False):
    """One group after the other, a block of rows at a time. The last block of a group may reach
    into the next group, whose own blocks overwrite the surplus rows afterwards."""
    size, starts = _blocks(x, kernels, group_sizes)
    padded = jnp.pad(x, [(0, size), (0, 0)])

    def group(y, inputs):
        kernel, start, count = inputs
        kernel = _widened(kernel, x.dtype)

        def block(i, y):
            at = start + i * size
            rows = jax.lax.dynamic_slice_in_dim(padded, at, size)
            rows = rows @ (kernel.T if transposed else kernel)
            return jax.lax.dynamic_update_slice_in_dim(y, rows, at, axis=0)

        return jax.lax.fori_loop(0, (count + size - 1) // size, block, y), None

    y = jnp.zeros((len(padded), kernels.shape[1 if transposed else 2]), x.dtype)
    y, _ = jax.lax.scan(group, y, (kernels, starts, group_sizes))
    return jnp.where(jnp.arange(len(x))[:, None] < group_sizes.sum(), y[: len(x)], 0)


def _widened(kernels, dtype):
    """The numbers of quantised kernels; others as they are."""
    return from_bits(kernels, dtype) if is_quantized(kernels) else kernels


def _blocks(x, kernels, group_sizes):
    """The rows of a block, a quarter of an even share, and the first row of each group."""
    size = max(_SMALLEST_BLOCK, -(-len(x) // (4 * len(kernels))))
    return size, jnp.cumsum(group_sizes) - group_sizes


def _backward(inputs, dy):
    """dy[g] @ kernels[g].T, and x[g].T @ dy[g] with sums in float32 or wider, for each group g."""
    x, kernels, group_sizes = inputs
    size, starts = _blocks(x, kernels, group_sizes)
    padded = [jnp.pad(z, [(0, size), (0, 0)]) for z in (x, dy)]
    zeros = jnp.zeros(kernels.shape[1:], upcast(x.dtype))

    def group(inputs):
        start, count = inputs

        def block(i, total):
            at = start + i * size
            rows, gradients = (jax.lax.dynamic_slice_in_dim(z, at, size) for z in padded)
            rows = jnp.where((at + jnp.arange(size) < start + count)[:, None], rows, 0)
            return total + jnp.matmul(rows.T, gradients, preferred_element_type=total.dtype)

        return jax.lax.fori_loop(0, (count + size - 1) // size, block, zeros)

    d_kernels = jax.lax.map(group, (starts, group_sizes)).astype(kernels.dtype)
    return _by_blocks(dy, kernels, group_sizes, transposed=True), d_kernels, None


_on_cpu.defvjp(lambda *inputs: (_on_cpu(*inputs), inputs), _backward)
