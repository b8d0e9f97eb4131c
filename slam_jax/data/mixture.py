"""The order in which rows of several sets are drawn by weight."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from slam_jax.data.records import Rebuilt

_BLOCK = 4_096


class MixedOrder(Rebuilt, Sequence[int]):
    """Endless indices into joined sets; each is a function of (seed, place) alone.

    Every 4,096 draws have each set as often as its weight says, to one draw and at least once, in
    random order. All rows of a set come once before one comes again, reshuffled each time.

    sizes: the number of rows and the weight of each set, in the order in which they are joined.
    """

    def __init__(self, sizes: Sequence[tuple[int, float]], seed: int):
        self._seed = seed
        self._counts = [size for size, _ in sizes]
        self._starts = np.cumsum([0, *self._counts]).tolist()
        self._quotas = _quotas([weight for _, weight in sizes])
        self._block = functools.lru_cache(maxsize=8)(self._make_block)
        self._epoch = functools.lru_cache(maxsize=2 * len(sizes))(self._make_epoch)

    def __len__(self) -> int:
        return sys.maxsize

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: Any) -> Any:
        block, place = divmod(index, _BLOCK)
        chosen, ranks = self._block(block)
        part = int(chosen[place])
        epoch, row = divmod(block * self._quotas[part] + int(ranks[place]), self._counts[part])
        return self._starts[part] + int(self._epoch(part, epoch)[row])

    def _make_epoch(self, part: int, epoch: int) -> np.ndarray:
        # Not Grain's shuffle, which takes milliseconds a row where a set has few.
        rng = np.random.default_rng((self._seed, part, epoch))
        return rng.permutation(self._counts[part])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The set of each draw of a block, and how many draws of that set are before it."""
        sets = np.repeat(np.arange(len(self._quotas)), self._quotas)
        chosen = np.random.default_rng((self._seed, block)).permutation(sets)
        ranks = np.empty(_BLOCK, np.int64)
        for part, quota in enumerate(self._quotas):
            ranks[chosen == part] = np.arange(quota)
        return chosen, ranks


def _quotas(weights: Sequence[float]) -> list[int]:
    """How often each set is drawn in a block: by the largest remainder, and at least once."""
    shares = np.array(weights, float) / sum(weights) * _BLOCK
    quotas = np.maximum(1, np.floor(shares)).astype(int)
    while (missing := _BLOCK - int(quotas.sum())) != 0:
        lower = np.where(quotas > 1, quotas - shares, -np.inf)
        place = int(np.argmax(shares - quotas if missing > 0 else lower))
        quotas[place] += 1 if missing > 0 else -1
    return quotas.tolist()
