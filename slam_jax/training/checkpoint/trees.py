"""Names, shapes and dtypes of the arrays of a tree, and how two trees differ in them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree


def describe(tree: PyTree[Any]) -> dict[str, str]:
    """Name -> dtype and shape, such as `params/head/kernel` -> `float32[8, 4]`."""
    return {name: _words(leaf) for name, leaf in by_name(tree).items()}


def by_name(tree: PyTree[Any]) -> dict[str, Any]:
    """The leaves of a tree by their path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def find_difference(saved: PyTree[Any], like: PyTree[Any]) -> str | None:
    """The first array in which two trees differ by shape or dtype, in words; None if none does.

    Orbax itself casts dtypes silently and does not name an array of another shape.
    """
    ours, theirs = describe(like), describe(saved)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            return (
                f"{name} is {theirs.get(name, 'absent')} in the checkpoint and "
                f"{ours.get(name, 'absent')} here"
            )
    return None


def find_oversized_chunk(saved: Mapping[str, Any]) -> str | None:
    """The first array whose stored chunks are larger than itself; None if there is none.

    A chunk is allocated before it is read, so a damaged file could ask for any amount of memory.
    """
    for name, leaf in by_name(saved).items():
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


def _stored(leaf: Any) -> Any:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return leaf


def _words(leaf: Any) -> str:
    leaf = _stored(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"
