"""Each group of rows times the kernel of its group: the product of a mixture of experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slam_jax.kernels.backend import on_cpu
from slam_jax.kernels.row_product import picked_row_product

# With so few rows, one product a row that reads its kernel in place is faster.
_FEW_ROWS = 8
_SMALLEST_BLOCK = 32


def grouped_matmul(
    x: Float[Array, "rows I"], kernels: Float[Array, "E I O"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows O"]:
    """y[r] = x[r] @ kernels[g] for each row r of group g; 0 for rows after the last group.

    Rows are sorted by group; group_sizes are the numbers of rows of each. `jax.lax.ragged_dot` on
    accelerators. On a CPU that multiplies every row by every kernel, so a loop over blocks of rows
    takes its place there; it supports reverse-mode differentiation only.
    """
    return _on_cpu(x, kernels, group_sizes) if on_cpu() else ragged_dot(x, kernels, group_sizes)


def ragged_dot(
    x: Float[Array, "rows I"], kernels: Float[Array, "E I O"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows O"]:
    """The plain form of `grouped_matmul`."""
    y = jax.lax.ragged_dot(x, kernels, group_sizes)
    return jnp.where(jnp.arange(len(x))[:, None] < group_sizes.sum(), y, 0)


@jax.custom_vjp
def _on_cpu(x, kernels, group_sizes):
    if len(x) > _FEW_ROWS:
        return _by_blocks(x, kernels, group_sizes)
    ends = jnp.cumsum(group_sizes)
    groups = jnp.sum(jnp.arange(len(x))[:, None] >= ends[None], axis=-1)
    picks = jnp.minimum(groups, len(kernels) - 1)
    rows = [picked_row_product(row, kernels, pick) for row, pick in zip(x, picks, strict=True)]
    return jnp.where(groups[:, None] < len(kernels), jnp.stack(rows), 0)


def _by_blocks(x, kernels, group_sizes, contracted: int = 1):
    """One group after the other, a block of rows at a time.

    The last block of a group may reach into the next group, whose own blocks overwrite the surplus
    rows afterwards. contracted: the axis of the kernels that the features of x contract.
    """
    size = _block_size(x, kernels)
    starts = jnp.cumsum(group_sizes) - group_sizes
    padded = jnp.pad(x, [(0, size), (0, 0)])

    def group(y, inputs):
        kernel, start, count = inputs

        def block(i, y):
            at = start + i * size
            rows = jax.lax.dynamic_slice_in_dim(padded, at, size)
            rows = jax.lax.dot_general(rows, kernel, (((1,), (contracted - 1,)), ((), ())))
            return jax.lax.dynamic_update_slice_in_dim(y, rows, at, axis=0)

        return jax.lax.fori_loop(0, (count + size - 1) // size, block, y), None

    y = jnp.zeros((len(padded), kernels.shape[3 - contracted]), x.dtype)
    y, _ = jax.lax.scan(group, y, (kernels, starts, group_sizes))
    return jnp.where(jnp.arange(len(x))[:, None] < group_sizes.sum(), y[: len(x)], 0)


def _kernel_gradients(x, dy, kernels, group_sizes):
    """x[g].T @ dy[g] for each group g of rows, in float32 or wider."""
    size = _block_size(x, kernels)
    starts = jnp.cumsum(group_sizes) - group_sizes
    x, dy = (jnp.pad(z, [(0, size), (0, 0)]) for z in (x, dy))
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def group(_, inputs):
        start, count = inputs

        def block(i, total):
            at = i * size
            own = (at + jnp.arange(size))[:, None] < count
            rows, gradients = (jax.lax.dynamic_slice_in_dim(z, start + at, size) for z in (x, dy))
            rows = jnp.where(own, rows, 0)
            return total + jnp.matmul(rows.T, gradients, preferred_element_type=dtype)

        zeros = jnp.zeros(kernels.shape[1:], dtype)
        return None, jax.lax.fori_loop(0, (count + size - 1) // size, block, zeros)

    return jax.lax.scan(group, None, (starts, group_sizes))[1].astype(kernels.dtype)


def _block_size(x, kernels) -> int:
    """A quarter of an even share: few surplus rows, and products of many rows."""
    return max(_SMALLEST_BLOCK, -(-len(x) // (4 * len(kernels))))


def _forward(x, kernels, group_sizes):
    return _on_cpu(x, kernels, group_sizes), (x, kernels, group_sizes)


def _backward(residuals, dy):
    x, kernels, group_sizes = residuals
    dx = _by_blocks(dy, kernels, group_sizes, contracted=2)
    return dx, _kernel_gradients(x, dy, kernels, group_sizes), None


_on_cpu.defvjp(_forward, _backward)
