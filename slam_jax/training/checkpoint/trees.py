"""Names, shapes and dtypes of the arrays of a tree, and how two trees differ in them.

Arrays of stacked layers count as one array for each layer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from slam_jax.layers.stacked import names_of


def describe(tree: PyTree[Any]) -> dict[str, str]:
    """Name -> dtype and shape, such as `params/head/kernel` -> `float32[8, 4]`."""
    return {name: _words(leaf) for name, leaf in by_name(tree).items()}


def by_name(tree: PyTree[Any]) -> dict[str, Any]:
    """The leaves of a tree by their path."""
    found = {}
    for name, leaf in _leaves(tree).items():
        names, axis = names_of(name)
        if axis is None:
            found[name] = leaf
        else:
            found |= {each: _layer(leaf, axis, i) for i, each in enumerate(names)}
    return found


def from_names(named: Mapping[str, Any], like: PyTree[Any]) -> PyTree[Any]:
    """The inverse of `by_name`: these arrays in the structure of `like`."""
    arrays = []
    for name in _leaves(like):
        names, axis = names_of(name)
        each = [named[name] for name in names]
        arrays.append(each[0] if axis is None else jnp.stack(each, axis))
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def stacks_alike(saved: PyTree[Any], like: PyTree[Any]) -> bool:
    """Whether two trees stack the same layers."""
    return _leaves(saved).keys() == _leaves(like).keys()


def sharded_as(saved: PyTree[Any], like: PyTree[Any]) -> PyTree[Any]:
    """The shapes of one tree with the shardings of another, which may stack other layers."""
    shardings = {}
    for name, leaf in _leaves(like).items():
        names, axis = names_of(name)
        own = leaf.sharding
        if axis is not None and isinstance(own, NamedSharding):
            own = NamedSharding(own.mesh, PartitionSpec(*_without(axis, tuple(own.spec))))
        shardings |= dict.fromkeys(names, own)

    def sharded(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        [name, *_], axis = names_of(_name(path))
        own = shardings[name]
        if axis is not None and isinstance(own, NamedSharding):
            spec = [*own.spec, *[None] * axis]
            own = NamedSharding(own.mesh, PartitionSpec(*spec[:axis], None, *spec[axis:]))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    return jax.tree.map_with_path(sharded, saved)


def find_difference(saved: PyTree[Any], like: PyTree[Any]) -> str | None:
    """The first array in which two trees differ by shape or dtype, in words; None if none does.

    Orbax itself casts dtypes silently and does not name an array of another shape. Only the average
    and the state of the optimizer may have floats of another width: up to version 0.27 they had the
    dtype of the parameters.
    """
    ours, theirs = describe(like), describe(saved)
    for name in ours | theirs:
        if _comparable(name, ours.get(name)) != _comparable(name, theirs.get(name)):
            return (
                f"{name} is {theirs.get(name, 'absent')} in the checkpoint and "
                f"{ours.get(name, 'absent')} here"
            )
    return None


def _comparable(name: str, words: str | None) -> str | None:
    if words is None or not name.startswith(("ema/", "opt_state/")):
        return words
    return re.sub(r"^b?float\d+", "float", words)


def find_oversized_chunk(saved: Mapping[str, Any]) -> str | None:
    """The first array whose stored chunks are larger than itself; None if there is none.

    A chunk is allocated before it is read, so a damaged file could ask for any amount of memory.
    """
    for name, leaf in _leaves(saved).items():
        chunk = tuple(leaf.storage_metadata.chunk_shape)
        if len(chunk) != len(leaf.shape) or any(
            size > max(whole, 1) for size, whole in zip(chunk, leaf.shape, strict=True)
        ):
            return f"{name} is {_words(leaf)} in chunks of {list(chunk)}"
    return None


def num_bytes(tree: PyTree[Any]) -> int:
    """The memory that the arrays of a tree take; a typed PRNG key counts as its integers."""
    stored = [_stored(leaf) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stored)


def _leaves(tree: PyTree[Any]) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _layer(leaf: Any, axis: int, index: int) -> Any:
    if hasattr(leaf, "__getitem__"):
        return leaf[(slice(None),) * axis + (index,)]
    return jax.ShapeDtypeStruct(_without(axis, leaf.shape), leaf.dtype)


def _without(axis: int, sizes: Sequence[Any]) -> tuple[Any, ...]:
    return (*sizes[:axis], *sizes[axis + 1 :])


def _stored(leaf: Any) -> Any:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return leaf


def _words(leaf: Any) -> str:
    leaf = _stored(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"
