"""The caches of prompts that were read before, in chunks, for prompts that begin like them.

A chunk of a prompt is stored under all tokens up to its end. For leaves of the cache that grow with
the tokens it holds its own tokens' part; of all other leaves, such as the state of Mamba or a ring,
it holds the whole. Only whole chunks of prompts are stored, in the bits that reading gave them.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from slam_jax.serving.recent import Recent
from slam_jax.serving.slots import Axes


class PromptCache:
    """Chunks of `chunk` tokens, the least recently used ones dropped beyond `most` bytes.

    axes: of the leaves of the model's cache.
    """

    def __init__(self, axes: tuple[Axes, ...], chunk: int, most: int):
        self._axes, self._chunk, self._chunks = axes, chunk, Recent(most)

    def keys(self, tokens: Sequence[int], memory: bytes) -> list[bytes]:
        """The keys of the whole chunks of a prompt. memory: what else its cache depends on."""
        key, found = memory, []
        rows = np.asarray(tokens, np.int32)
        for end in range(self._chunk, len(rows) + 1, self._chunk):
            key = hashlib.sha256(key + rows[end - self._chunk : end].tobytes()).digest()
            found.append(key)
        return found

    def restore(self, cache: Any, key: bytes, index: int) -> Any:
        """The cache of one row with its chunk number `index`, or None where that is not stored.

        The given cache has the chunks before it, and is gone if the result is one.
        """
        stored = self._chunks.get(key)
        if stored is None:
            return None
        return _write(cache, stored, np.int32(index * self._chunk), axes=self._axes)

    def store(self, cache: Any, key: bytes, index: int) -> None:
        """Stores chunk number `index` of the cache of one row, which ends with it."""
        start = np.int32(index * self._chunk)
        self._chunks.put(key, _part(cache, start, axes=self._axes, size=self._chunk))

    def touch(self, keys: Sequence[bytes]) -> None:
        """Counts the chunks of a prompt as used, so that the first ones are dropped last."""
        self._chunks.touch(reversed(keys))


@functools.partial(jax.jit, static_argnames=("axes", "size"))
def _part(cache, start, axes, size):
    def part(leaf: Any, axis: Axes) -> Any:
        if axis.tokens is None:
            return leaf.copy()
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis.tokens)

    return [part(*each) for each in zip(jax.tree.leaves(cache), axes, strict=True)]


@functools.partial(jax.jit, static_argnames="axes", donate_argnums=0)
def _write(cache, stored, start, axes):
    leaves, tree = jax.tree.flatten(cache)

    def written(leaf: Any, part: Any, axis: Axes) -> Any:
        if axis.tokens is None:
            return part
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis.tokens)

    return tree.unflatten([written(*each) for each in zip(leaves, stored, axes, strict=True)])
