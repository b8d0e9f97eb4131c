"""The split of each row: as given, or chosen by what the row shows."""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slam_jax.data.rows import Row

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **{name: name for name in ("", *SPLITS)},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("val", "valid", "dev", "development"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
_ENDS = {"train": 0.8, "validation": 0.9, "test": 1.0}


class Read(NamedTuple):
    """A row with the split that it was given, "" = none.

    contents: an identity of each picture that it shows; without one, of its text or numbers. Rows
    with a common one show the same. key: the identity that chooses a split.
    """

    split: str
    contents: tuple[bytes, ...]
    key: bytes
    row: Row


class Divided(NamedTuple):
    """Rows by split. shared: a line of each content that is in more than one split. made: the
    splits that were made of training rows because none was given."""

    rows: dict[str, list[Row]]
    shared: list[int]
    made: tuple[str, ...] = ()


def identity(text: str) -> bytes:
    """16 bytes that depend on `text` alone."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]


def split_of_name(path: Path) -> str:
    """The split that the name of a file, or else of a folder around it, has as a word; "" = none.

    Such as `test.csv`, `train-00000-of-00002.parquet` and `validation/0000.parquet`.
    """
    for name in (path.stem, *(parent.name for parent in path.parents)):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word and word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return ""


def choose(
    keys: Iterable[bytes], ends: Mapping[str, float], given: Collection[str]
) -> dict[bytes, str]:
    """The split of each key, by its place in [0, 1).

    ends: where the splits end. given: the splits that have rows already; if another one would have
    none, the first key is for training, and the last two are for validation and test.
    """
    places = {key: _place(key) for key in keys}
    chosen = {key: next(s for s in SPLITS if place < ends[s]) for key, place in places.items()}
    if set(SPLITS) - set(chosen.values()) - set(given) and len(chosen) >= len(SPLITS):
        first, *_, last_but_one, last = sorted(places, key=places.__getitem__)
        chosen |= {first: "train", last_but_one: "validation", last: "test"}
    return chosen


def divide(read: Sequence[Read], version: int | None) -> Divided:
    """The rows by split. Rows with a common content are in one split unless others are given.

    A place in [0, 1) that depends on the content alone chooses the split of the other rows: below
    0.8 for training, below 0.9 for validation. If training rows are given, and none for validation
    or test, they are made of these by the same rule, with at least one content each.
    version: see `DataConfig.table_version`.
    """
    if any(len(each.contents) > 1 for each in read):
        roots = connect(each.contents for each in read)
        read = [each._replace(key=roots[each.contents[0]]) for each in read]
    named = {each.key: each.split for each in reversed(read) if each.split}
    follows = named if version is not None else {}
    free = [each.key for each in read if not each.split and each.key not in follows]
    chosen = choose(free, _ENDS, {each.split for each in read})
    splits = [each.split or follows.get(each.key) or chosen[each.key] for each in read]
    made = _moved(read, splits) if version is not None else {}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    seen: dict[bytes, str] = {}
    shared: dict[bytes, int] = {}
    for each, given in zip(read, splits, strict=True):
        split = made.get(each.key, given) if given == "train" else given
        rows[split].append(each.row)
        for content in each.contents:
            if seen.setdefault(content, split) != split:
                shared.setdefault(content, line_of(each.row))
    names = tuple(split for split in SPLITS if split in made.values())
    return Divided(rows, list(shared.values()), names)


def _moved(read: Sequence[Read], splits: Sequence[str]) -> Mapping[bytes, str]:
    """The new split of contents that are given for training while another split has no row."""
    lacking = [split for split in SPLITS[1:] if split not in splits]
    given = {e.key for e, split in zip(read, splits, strict=True) if e.split == split == "train"}
    if not lacking or len(given) <= len(lacking):
        return {}
    places = sorted((_place(key), key) for key in given)
    starts = {"validation": _ENDS["train"], "test": _ENDS["validation"]}
    moved = {
        key: split
        for split in lacking
        for place, key in places
        if starts[split] <= place < _ENDS[split]
    }
    if set(moved.values()) == set(lacking) and len(moved) < len(given):
        return moved
    last = places[-len(lacking) :]
    return {key: split for (_, key), split in zip(last, lacking, strict=True)}


def connect(shown: Iterable[Sequence[bytes]]) -> dict[bytes, bytes]:
    """For what each row shows: the identity of each group of contents that rows connect, which is
    the smallest of it."""
    shown = list(shown)
    parents = {content: content for each in shown for content in each}

    def find(content: bytes) -> bytes:
        while parents[content] != content:
            parents[content] = content = parents[parents[content]]
        return content

    for each in shown:
        for other in each[1:]:
            low, high = sorted((find(each[0]), find(other)))
            parents[high] = low
    return {content: find(content) for content in parents}


def line_of(row: Row) -> int:
    """The line of the table that the row is from."""
    return int(row.where.rpartition(" ")[-1])


def _place(key: bytes) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(key[:8], "big") / 2**64
