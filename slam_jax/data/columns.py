"""Which columns of a data set are read, and as what."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slam_jax.data.config import ColumnsConfig
from slam_jax.data.formats.base import Found, Record, StoredPicture
from slam_jax.data.numbers import is_missing, parse_number
from slam_jax.data.records import DataError
from slam_jax.data.tables import COLUMNS
from slam_jax.errors import ConfigError, check_names, shorten

# Identifiers say nothing about a row. Tables of one's own have the numbers that they should have.
_MOST_NUMBERS = 1_024
_IDENTIFIER = re.compile(r"(.*[_/ -])?(id|ids|idx|index|uid|uuid|level_\d+__)", re.IGNORECASE)


class Columns(NamedTuple):
    """How the columns of a data set are used.

    read: ours -> the name in the data. numbers: the columns of numbers that are inputs. unused: the
    others, with the line and the value of the first that is no number, None where all are numbers.
    present: all names.
    """

    read: Mapping[str, str]
    numbers: tuple[str, ...]
    unused: Mapping[str, tuple[int, Any] | None]
    present: tuple[str, ...]


class _Seen(NamedTuple):
    """present: every name, and how many records have a value of it. lists: names with a list.
    votes: of each name, values that are numbers minus those that are not. others: the first value
    that is no number, and its line."""

    present: dict[str, int]
    lists: set[str]
    votes: dict[str, int]
    others: dict[str, tuple[int, Any]]
    first: tuple[int, Record] | None


def choose_columns(
    found: Found,
    config: ColumnsConfig,
    *,
    version: int | None,
    wanted: Sequence[str] | None = None,
) -> Columns:
    """Reads all records once and chooses the columns.

    version: see `DataConfig.table_version`. wanted: the number columns to read, in this order,
    whatever their order in the data; None = those of the data. A column whose values are mostly
    numbers is one of numbers.

    Raises:
      ConfigError: `config` names a column that is not there.
      DataError: there is no column of answers, or not the `wanted` ones.
    """
    seen = _look(found, version)
    read: dict[str, str] = {}
    for ours, name in config.named.items():
        if name is not None:
            if seen.present:
                check_names(
                    [name], list(seen.present), f"data.columns.{ours}: {found.path}", "column"
                )
            read[ours] = name
    for ours, names in found.aliases.items():
        usable = [n for n in names if n in seen.present and n not in read.values()]
        if ours == "image" and found.own and usable == ["images"] and "images" not in seen.lists:
            usable = []
        if not found.own:  # a name that few records have is not the usual one
            most = max((seen.present[name] for name in usable), default=0)
            usable = [name for name in usable if 2 * seen.present[name] >= most]
        if ours not in read and usable:
            read[ours] = usable[0]
    if seen.first is not None and "answer" not in read:
        line, record = seen.first
        have = shorten(", ".join(map(repr, record)) or "none")
        raise DataError(
            f"{found.path}, row {line}: no column 'answer'; it has {have}: "
            "name the column with the answers so, or with data.columns.answer"
        )
    numbers = _numbers(found, config, seen, read, wanted, version)
    used = {*read.values(), *numbers}
    unused = {n: seen.others.get(n) for n in seen.votes if n not in used}
    return Columns(read, numbers, unused, tuple(seen.present))


def _look(found: Found, version: int | None) -> _Seen:
    seen = _Seen({}, set(), collections.defaultdict(int), {}, None)
    first = None
    for _, line, record, _ in found.read():
        if isinstance(record, str):
            continue
        first = first or (line, record)
        for name, value in record.items():
            has_value = isinstance(value, StoredPicture) or not is_missing(value)
            seen.present[name] = seen.present.get(name, 0) + has_value
            if isinstance(value, list):
                seen.lists.add(name)
            if isinstance(value, StoredPicture) or not has_value:
                continue
            number = parse_number(value, words=version is not None)
            seen.votes[name] += -1 if number is None else 1
            if number is None:
                seen.others.setdefault(name, (line, value))
    return seen._replace(first=first)


def _numbers(
    found: Found,
    config: ColumnsConfig,
    seen: _Seen,
    read: Mapping[str, str],
    wanted: Sequence[str] | None,
    version: int | None,
) -> tuple[str, ...]:
    taken = set(read.values())
    if config.numbers is not None:
        check_names(
            config.numbers, list(seen.present), f"data.columns.numbers: {found.path}", "column"
        )
        if both := [name for name in config.numbers if name in taken]:
            raise ConfigError(
                f"data.columns.numbers has {both[0]!r}, which is read as another input"
            )
        names = tuple(config.numbers)
    else:
        # The usual names of a table of one's own are never numbers.
        taken |= set(COLUMNS) if found.own else set()
        names = tuple(n for n, vote in seen.votes.items() if vote > 0 and n not in taken)
        if not found.own:
            names = tuple(n for n in names if not _IDENTIFIER.fullmatch(n))
    if len(names) > _MOST_NUMBERS:
        raise DataError(
            f"{found.path} has {len(names):,} columns of numbers; at most {_MOST_NUMBERS:,} are "
            "read: choose some by data.columns.numbers"
        )
    if wanted is None:
        return names
    known = {name.strip(): name for name in seen.present}
    matched = [known[name.strip()] for name in wanted if name.strip() in known]
    # Tables of version None had other rules for which columns hold numbers.
    more = version is not None and not set(names) <= set(matched)
    if len(matched) < len(wanted) or more:
        raise DataError(
            f"{found.path} has the number columns {shorten(', '.join(names)) or 'none'}, and the "
            f"checkpoint was trained on {shorten(', '.join(wanted)) or 'none'}; give a table with "
            "the same names, in any order"
        )
    return tuple(matched)
