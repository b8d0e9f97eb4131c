"""Sharding as layers see it: names of array dimensions, which the mesh in force divides."""

import contextlib
import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree, Shaped

# Name of a dimension -> the mesh axes that divide it. Where the devices of `process` hold different
# processes, they hold the same rows of the batch (`taken`); elsewhere each has rows of its own.
AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "process"),
    "process": ("process",),
    "expert": ("tensor",),
    "head": ("tensor",),
}
_TAKEN: contextvars.ContextVar[Collection[str]] = contextvars.ContextVar("taken", default=())


@contextlib.contextmanager
def taken(axis: str) -> Iterator[None]:
    """In this context no dimension is divided over this mesh axis: it divides the dimension that an
    enclosing `jax.vmap` maps over."""
    token = _TAKEN.set((*_TAKEN.get(), axis))
    try:
        yield
    finally:
        _TAKEN.reset(token)


def constrain(x: Shaped[Array, "..."], names: Sequence[str | None]) -> Shaped[Array, "..."]:
    """x, sharded over the mesh in force (`jax.set_mesh`); x itself without a mesh.

        with jax.set_mesh(slam_jax.training.mesh.make_mesh(MeshConfig(tensor=4))):
            y = jax.jit(lambda q: constrain(q, ("batch", None, "head")))(q)  # [B, T, N, H]

    names: for each of the first dimensions of x a key of `AXES`, or None = not divided; later
    dimensions are not divided either. A mesh axis that does not divide its dimension evenly is left
    out, and so is one that the mesh does not have.

    The axes of the mesh must be `AxisType.Auto`, as those of `slam_jax.training.mesh.make_mesh`
    are; those of `jax.make_mesh` are explicit unless it is told otherwise. Outside of `jax.jit`, x
    must be on the mesh. With a mesh, raises KeyError for another name.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fit_names(x, names, mesh))


def gather_rows(x: PyTree[Shaped[Array, "B ..."]]) -> PyTree[Shaped[Array, "B ..."]]:
    """Arrays with the same rows of the batch on all devices of the mesh axis `process`, for
    `taken("process")`. Their gradients are summed and divided again."""
    return jax.tree.map(lambda x: _shared_rows(constrain(x, ("batch",))), x)


def divide_rows(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """A sum over processes, with other rows of the batch on each device of `process`.

    Both shardings are named, as in `gather_rows`, or else the compiler gathers what is summed.
    """
    return constrain(_shared_rows(x), ("batch",))


def _shared_rows(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    with taken("process"):
        return constrain(x, ("batch",))


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
    divided, rows = (_fit_names(x, [of], mesh) for x, of in ((leaf, name), (batch[0], "batch")))
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

    axes: the wanted axes of each dimension. An axis is skipped where the mesh does not have it, an
    earlier dimension has it, or it does not divide what is left of the dimension evenly.
    """
    found, free = [], dict(sizes)
    for size, wanted in zip(shape, axes, strict=False):
        here = []
        for axis in wanted:
            if axis in free and size % free[axis] == 0:
                here.append(axis)
                size //= free.pop(axis)
        found.append(tuple(here))
    return PartitionSpec(*(here or None for here in found))


def _fit_names(x: Any, names: Sequence[str | None], mesh: Any) -> PartitionSpec:
    free = {axis: size for axis, size in mesh.shape.items() if axis not in _TAKEN.get()}
    return fit(x.shape, [() if name is None else AXES[name] for name in names], free)
