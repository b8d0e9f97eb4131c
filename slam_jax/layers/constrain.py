"""All that a layer knows of devices: what the dimensions of an array are called."""

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


def alone() -> bool:
    """Whether there is no mesh in force."""
    return jax.sharding.get_abstract_mesh().empty


def constrain(x: Shaped[Array, "..."], names: Sequence[str | None]) -> Shaped[Array, "..."]:
    """x, laid out over the devices of the mesh in force (`jax.set_mesh`); x itself without one.

    names: of the first dimensions of x, each one of `AXES`, or None where every device has the
    whole of it; so it is with the dimensions after them. Raises KeyError for another name.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fit_names(x, names, mesh))


def sum_over(
    name: str,
    f: Callable[..., Shaped[Array, "N ..."]],
    parts: PyTree[Shaped[Array, "_ ..."]],
    batch: Sequence[Shaped[Array, "N ..."]],
) -> Shaped[Array, "N ..."]:
    """The sum of f(first, part, *rows) over the devices of the mesh in force that each have a part
    of dimension `name`, the first one of the arrays in `parts`; f(0, parts, *batch) without one.

    first: where the part begins. rows: the device's part of `batch`, the same for all that are
    summed; so it is with what f gives.
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
    # Unchecked: a loop that begins with zeros, or a gradient of its own, would have to say over
    # which axes its arrays differ, and f knows none.
    return jax.shard_map(here, in_specs=specs, out_specs=rows, check_vma=False)(parts, *batch)


def per_device(
    f: Callable[..., Shaped[Array, "..."]],
    arrays: Sequence[Shaped[Array, "..."]],
    names: Sequence[Sequence[str | None]],
) -> Shaped[Array, "..."]:
    """f(*arrays), on each device of the mesh in force of its own part; f(*arrays) without one, or
    where a caller's `shard_map` has divided them.

    For a kernel, which the compiler cannot divide. names: of the first dimensions of each array, as
    for `constrain`; f is applied along them, and what it gives is divided as the first array is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return f(*arrays)
    specs = tuple(_fit_names(x, of, mesh) for x, of in zip(arrays, names, strict=True))
    return jax.shard_map(f, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def fit(
    shape: Sequence[int], axes: Sequence[Sequence[str]], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The layout of an array whose dimensions are divided by these mesh axes.

    Of the axes of a dimension those are taken, from the first on, that the mesh has and that divide
    it evenly; where none does, every device has the whole dimension.
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
