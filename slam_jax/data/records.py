"""Random access to records of which some may be damaged."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from slam_jax.errors import UserError, first_line


class DataError(UserError):
    """A data set cannot be read, or too many of its records are damaged."""


class DamagedRecord(Exception):
    """A record cannot be read. Raised by a `Source`; batches skip the record."""


class Records(Sequence[Any]):
    """The records of a split.

    Args:
      records: indexing it may raise any exception for a damaged record.
      name: of the split, for messages.
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
        except Exception as error:  # the reader's library has no type of its own for it
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
