"""Sharding as layers see it: names of array dimensions, which the mesh in force divides."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree, Shaped

# Name of a dimension -> the mesh axes that divide it.
AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "process": ("process",),
    "expert": ("tensor",),
    "head": ("tensor",),
}


def constrain(x: Shaped[Array, "..."], names: Sequence[str | None]) -> Shaped[Array, "..."]:
    """x, sharded over the mesh in force (`jax.set_mesh`); x itself without a mesh.

    names: for each of the first dimensions of x a key of `AXES`, or None = not divided; later
    dimensions are not divided either. Raises KeyError for another name.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fit_names(x, names, mesh))


def sum_over(
    name: str,
    f: Callable[..., Shaped[Array, "B ..."]],
    parts: PyTree[Shaped[Array, "_ ..."]],
    batch: Sequence[Shaped[Array, "B ..."]],
) -> Shaped[Array, "B ..."]:
    """f(0, parts, *batch), computed in parts that are summed over the mesh in force.

    parts: arrays whose first dimension is called `name`. Each device calls f(first, part, *rows)
    with its own part, which begins at index `first`, and its own rows of `batch`; the results are
    summed over the devices that hold different parts for the same rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f(0, parts, *batch)
    leaf, *_ = jax.tree.leaves(parts)
    divided, rows = (
        fit(x.shape[:1], [AXES[of]], mesh.shape) for x, of in ((leaf, name), (batch[0], "batch"))
    )
    axes = divided[0] or ()

    def here(part: Any, *rows: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(axes) * len(jax.tree.leaves(part)[0])
        return jax.lax.psum(f(first, part, *rows), axes)

    specs = (divided, *(rows for _ in batch))
    # check_vma=False: a loop that starts from zeros, or a custom gradient, would have to say over
    # which mesh axes its arrays vary, and f knows of no mesh.
    return jax.shard_map(here, in_specs=specs, out_specs=rows, check_vma=False)(parts, *batch)


def per_device(
    f: Callable[..., Shaped[Array, "..."]],
    arrays: Sequence[Shaped[Array, "..."]],
    names: Sequence[Sequence[str | None]],
) -> Shaped[Array, "..."]:
    """f(*arrays), where each device of the mesh in force calls f on its own part.

    For kernels, which the compiler cannot divide. Without a mesh, or inside a `shard_map`, f is
    called directly. names: for each array the names of its first dimensions, as for `constrain`. f
    works along these dimensions independently, and its result is divided like the first array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return f(*arrays)
    specs = tuple(_fit_names(x, of, mesh) for x, of in zip(arrays, names, strict=True))
    return jax.shard_map(f, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def fit(
    shape: Sequence[int], axes: Sequence[Sequence[str]], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The sharding of an array: for each dimension those of its mesh axes that divide it.

    axes: the wanted axes of each dimension. An axis is skipped where the mesh does not have it or
    it does not divide what is left of the dimension evenly.
    """
    taken = []
    for size, wanted in zip(shape, axes, strict=False):
        here = []
        for axis in wanted:
            if axis in sizes and size % sizes[axis] == 0:
                here.append(axis)
                size //= sizes[axis]
        taken.append(tuple(here))
    return PartitionSpec(*(here or None for here in taken))


def _fit_names(x: Any, names: Sequence[str | None], mesh: Any) -> PartitionSpec:
    return fit(x.shape, [() if name is None else AXES[name] for name in names], mesh.shape)
