"""Values that are kept while they are used, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any

import jax


class Recent:
    """Trees of arrays by key, of which the least recently used are dropped beyond `most` bytes."""

    def __init__(self, most: int):
        self._most = most
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Any:
        """The value, which counts as used now; None where there is none."""
        self.touch([key])
        return self._values.get(key)

    def touch(self, keys: Iterable[Hashable]) -> None:
        """Counts these as used, the last one as the most recent one."""
        for key in keys:
            if key in self._values:
                self._values.move_to_end(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Keeps the value, unless it alone has more bytes than all may have."""
        self.drop(key)
        size = _size(value)
        if size > self._most:
            return
        self._values[key] = value
        self.num_bytes += size
        while self.num_bytes > self._most:
            self.drop(next(iter(self._values)))

    def drop(self, key: Hashable) -> None:
        if key in self._values:
            self.num_bytes -= _size(self._values.pop(key))


def _size(value: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(value))
