"""Random access to records, some of which may be damaged."""

import bisect
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from slam_jax.errors import UserError, first_line


class DataError(UserError):
    """A data set cannot be read, or too many of its records are damaged."""


class DamagedRecord(Exception):
    """A record cannot be read. Raised by a `Source`; batches skip the record."""


class Rebuilt:
    """Base of classes that are pickled as the arguments of their constructor.

    Their locks and caches cannot be pickled, and a worker process needs its own.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any):
        created = super().__new__(cls)
        created._arguments = args, kwargs
        return created

    def __reduce__(self) -> tuple[Any, ...]:
        args, kwargs = self._arguments
        return functools.partial(type(self), **kwargs), args


class Mapped(Rebuilt, Sequence[Any]):
    """Records to which `convert` is applied when they are indexed; it may raise.

    kept: how many of the converted records are kept in memory.
    """

    def __init__(self, records: Sequence[Any], convert: Callable[[Any], Any], kept: int = 0):
        self._records = records
        self._read = functools.lru_cache(maxsize=kept)(lambda index: convert(records[index]))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._read(index)


class Joined(Rebuilt, Sequence[Any]):
    """Several sequences, one after the other."""

    def __init__(self, sequences: Sequence[Sequence[Any]]):
        self._sequences = sequences
        self._ends = list(itertools.accumulate(map(len, sequences)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect(self._ends, index)
        return self._sequences[part][index - (self._ends[part - 1] if part else 0)]


class Records(Rebuilt, Sequence[Any]):
    """The records of a split.

    Args:
      records: may raise any exception when a damaged record is indexed.
      name: the name of the split, for messages.
      most: how many damaged records are allowed.

    Raises, when indexed:
      DamagedRecord: the record is damaged; a warning is logged the first time.
      DataError: more than `most` records are damaged.
    """

    def __init__(self, records: Sequence[Any], name: str, most: int):
        self._records, self._name, self._most = records, name, most
        self._lock = threading.Lock()  # batches are made in several threads
        self.damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._records[index]
        except Exception as error:  # the libraries that read records have no common error type
            self._count(index, first_line(error))
            raise DamagedRecord(f"record {index} of {self._name}") from error

    def _count(self, index: int, reason: str) -> None:
        with self._lock:
            new = index not in self.damaged
            self.damaged.add(index)
            count = len(self.damaged)
        if count > self._most:
            raise DataError(
                f"{self._name}: {count} damaged, more than data.max_damaged_records={self._most}; "
                f"record {index}: {reason}; repair the data, or raise that number"
            )
        if new:
            logging.getLogger("slam_jax").warning(
                "%s: record %d is damaged and skipped (%s); %d of at most %d",
                *(self._name, index, reason, count, self._most),
            )
