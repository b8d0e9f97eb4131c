"""Rows sorted by expert, in blocks of one size, each for one expert: exact whatever the loads."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slam_jax.layers.linear import NUM_PARTS, matmul, matmul_back, sum_of_parts, transposed
from slam_jax.layers.precision import wide

Kernels = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


class Blocks(NamedTuple):
    """G blocks of S places.

    owners: the expert of each block. ends: the block after the last one of each expert; those from
    the last of them on have no choices.
    places: of each choice, among all G S; beyond them for one that goes nowhere. choices: in each
    place, beyond the last where it is empty.
    """

    owners: Int[Array, "G"]
    ends: Int[Array, "E"]
    places: Int[Array, "R"]
    choices: Int[Array, "G S"]


def cut(experts: Int[Array, "R"], num_experts: int, size: int) -> Blocks:
    """Blocks of `size` places for choices of experts; those of `num_experts` go nowhere."""
    # No expert leaves more than `size` - 1 places empty.
    num_blocks = (experts.size + num_experts * (size - 1)) // size
    before, loads = ranks(experts, num_experts)
    ends = jnp.cumsum(-(-loads // size))
    owners = jnp.sum(jnp.arange(num_blocks)[:, None] >= ends, axis=-1)
    starts = size * jnp.append(0, ends[:-1])
    nowhere = num_blocks * size
    places = starts.at[experts].get(mode="fill", fill_value=nowhere) + before
    choices = jnp.full(nowhere, experts.size).at[places].set(jnp.arange(experts.size), mode="drop")
    owners = jnp.minimum(owners, num_experts - 1)
    return Blocks(owners, ends, places, choices.reshape(-1, size))


def ranks(experts: Int[Array, "R"], num_experts: int) -> tuple[Int[Array, "R"], Int[Array, "E"]]:
    """How many choices before each are of the same expert, and how many there are of each."""
    seen = jnp.cumsum(jax.nn.one_hot(experts, num_experts, dtype=jnp.int32), axis=0)
    before = jnp.take_along_axis(seen, experts[:, None], axis=1, mode="fill", fill_value=1)
    return before[:, 0] - 1, seen[-1]


@jax.custom_vjp
def take(
    x: Float[Array, "N D"], there: Int[Array, "*M"], back: Int[Array, "N K"]
) -> Float[Array, "*M D"]:
    """x[there], and 0 for an index beyond the last.

    back: of each row of x, where it went, beyond the last for nowhere: the gradient is a gather
    too, because XLA:CPU scatters one row after the other.
    """
    return x.at[there].get(mode="fill", fill_value=0)


def _take_forward(x, there, back):
    return take(x, there, back), back


def _take_backward(back, gradient):
    gradient = gradient.reshape(-1, gradient.shape[-1])
    return gradient.at[back].get(mode="fill", fill_value=0).sum(axis=1), None, None


take.defvjp(_take_forward, _take_backward)


def gated_mlp(x: Float[Array, "G S D"], blocks: Blocks, kernels: Kernels) -> Float[Array, "G S D"]:
    """What the SwiGLU MLP of its owner makes of each block, all at once."""
    gate, up, down = (kernel[blocks.owners] for kernel in kernels)
    h = swiglu(jnp.einsum("gsd,gdf->gsf", x, gate), jnp.einsum("gsd,gdf->gsf", x, up))
    return jnp.einsum("gsf,gfd->gsd", h, down)


@jax.custom_vjp
def looped_gated_mlp(
    x: Float[Array, "G S D"], blocks: Blocks, kernels: Kernels
) -> Float[Array, "G S D"]:
    """`gated_mlp`, some blocks after others as far as they are used, one expert after the other: no
    block has a copy of its owner's kernels, nor a gradient."""
    return _looped_forward(x, blocks, kernels)[0]


def _looped_forward(x, blocks, kernels):
    def expert(results, own):
        bounds, (gate, up, down) = own

        def several(first, count, results):
            rows = _rows(x, first, count)
            into = (matmul(rows, gate), matmul(rows, up))
            new = (matmul(swiglu(*into), down), *into)
            return tuple(
                _put(result, first, each) for result, each in zip(results, new, strict=True)
            )

        return _as_many_at_once(bounds, len(x), several, results), None

    hidden = jnp.zeros((*x.shape[:2], kernels[0].shape[-1]), x.dtype)
    first = (jnp.zeros_like(x), hidden, hidden)
    (y, *inner), _ = jax.lax.scan(expert, first, (_bounds(blocks), kernels))
    return y, (x, blocks, kernels, *inner)


def _looped_backward(kept, dy):
    x, blocks, kernels, *inner = kept

    def expert(dx, own):
        bounds, each = own
        gate, up, down = each

        def several(first, count, results):
            dx, *totals = results
            rows, dy_rows, *into = (_rows(one, first, count) for one in (x, dy, *inner))
            h, pull = jax.vjp(swiglu, *into)
            dgate, dup = pull(matmul_back(dy_rows, down))
            products = ((rows, dgate), (rows, dup), (h, dy_rows))
            totals = (
                total + jnp.dot(transposed(one), other, preferred_element_type=total.dtype)
                for total, (one, other) in zip(totals, products, strict=True)
            )
            return _put(dx, first, matmul_back(dgate, gate) + matmul_back(dup, up)), *totals

        zeros = (jnp.zeros(kernel.shape, wide(kernel.dtype)) for kernel in each)
        dx, *totals = _as_many_at_once(bounds, len(x), several, (dx, *zeros))
        return dx, [total.astype(kernel.dtype) for total, kernel in zip(totals, each, strict=True)]

    dx, totals = jax.lax.scan(expert, jnp.zeros_like(x), (_bounds(blocks), kernels))
    return dx, None, tuple(totals)


def _as_many_at_once(bounds, num_blocks: int, several, results):
    """results = several(first, count, results) over the blocks between two bounds: 8 at once while
    there are as many, since larger products are faster, and what is left in 4, 2 and 1."""
    start, end = bounds
    for count in (count for count in (8, 4, 2, 1) if count <= num_blocks):
        times = (end - start) // count

        def body(i, results, start=start, count=count):
            return several(start + count * i, count, results)

        results = jax.lax.fori_loop(0, times, body, results)
        start += count * times
    return results


def _rows(blocks: Float[Array, "G S D"], first, count: int) -> Float[Array, "R D"]:
    some = jax.lax.dynamic_slice_in_dim(blocks, first, count)
    return some.reshape(-1, some.shape[-1])


def _put(blocks: Float[Array, "G S D"], first, rows: Float[Array, "R D"]) -> Float[Array, "G S D"]:
    some = rows.reshape(-1, *blocks.shape[1:])
    return jax.lax.dynamic_update_slice_in_dim(blocks, some, first, axis=0)


def _bounds(blocks: Blocks) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """The first block of each expert, and the one after its last."""
    return jnp.append(0, blocks.ends[:-1]), blocks.ends


looped_gated_mlp.defvjp(_looped_forward, _looped_backward)


def picked_product(
    row: Float[Array, "I"], kernels: Float[Array, "E I O"], pick: Int[Array, ""]
) -> Float[Array, "O"]:
    """row @ kernels[pick]."""
    # Of a matrix of one row: the kernel would be transposed for a vector.
    return (row[None] @ kernels[pick])[0]


@jax.custom_jvp
def read_product(
    row: Float[Array, "I"], kernels: Float[Array, "E I O"], pick: Int[Array, ""]
) -> Float[Array, "O"]:
    """`picked_product`, for which XLA:CPU would first copy the kernel, which takes longer than to
    multiply by it; here it is read where it stands."""
    num_experts, inputs, outputs = kernels.shape
    count = math.gcd(inputs, NUM_PARTS)
    parts = kernels.reshape(num_experts, count, -1, outputs)
    shape = (1, 1, inputs // count, outputs)
    starts = ((pick, i, 0, 0) for i in range(count))
    return sum_of_parts(row, (jax.lax.dynamic_slice(parts, i, shape)[0, 0] for i in starts))


@read_product.defjvp
def _read_product_tangent(primals, tangents):
    row, kernels, pick = primals
    of_row, of_kernels, _ = tangents
    change = picked_product(of_row, kernels, pick) + picked_product(row, of_kernels, pick)
    return read_product(row, kernels, pick), change


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    return jax.nn.silu(gate) * up
