"""Data of one's own: a folder with a table of questions and answers, and pictures.

The table is `*.jsonl` (an object a line) or `*.csv` (a header with the names first). Its columns:

    answer   the answer; blanks around it are removed and accents composed (Unicode NFC)
    prompt   the question; optional, as are all that follow
    image    the path of a picture, relative to the folder
    text     a text that the question is about
    kind     the kind of question, for the report
    split    train, validation or test; `val`, `dev`, `training` and the like are understood

Every other column whose values are mostly numbers gives one auxiliary vector a row. Empty values,
`NA` and `nan` are missing numbers; true and false are 1 and 0. Other columns are not used, nor are
columns of a CSV without a name (the index that pandas writes).
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.images import check_image
from slam_jax.data.notes import table_notes
from slam_jax.data.numbers import is_missing, parse_number
from slam_jax.data.records import DataError
from slam_jax.data.rows import ANY_KIND, Row
from slam_jax.data.tables import COLUMNS, Record, find_table, quote, read_records
from slam_jax.data.tokenizer import check_text
from slam_jax.errors import InputError, first_line, shorten

SPLITS = ("train", "validation", "test")
_ENDS = {"train": 0.8, "validation": 0.9, "test": 1.0}
_SPLIT_NAMES = {
    **{name: name for name in ("", *SPLITS)},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("val", "valid", "dev", "development"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
# A token is rarely longer; training a tokenizer takes time that grows with the square of a word.
_BYTES_PER_TOKEN = 16
_LONGEST_PATH = 1_000


class BadRow(NamedTuple):
    """A row that cannot be used. line: its line in the table, from 1 on."""

    line: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as read.

    rows: the usable rows by split. columns: the columns of numbers. ignored: the columns that are
    not used. bad: the rows that cannot be used. notes: what the user should know, one line each.
    """

    path: Path
    rows: dict[str, list[Row]]
    columns: tuple[str, ...]
    ignored: tuple[str, ...]
    bad: tuple[BadRow, ...]
    notes: tuple[str, ...] = ()


def read_table(
    path: str | Path,
    *,
    version: int | None = 2,
    columns: Sequence[str] | None = None,
    context_length: int | None = None,
) -> Table:
    """Reads and checks the table of a folder, or the table itself. Pictures are not decoded yet.

    Rows that show the same picture (or without one the same text, or the same numbers) are in the
    same split: the one given for any of them, else the one that the sha256 of the picture's file
    or the text chooses: 80% training, 10% validation, 10% test. Rows stay in their split when
    others are added. In a small table, validation and test have at least one row each.

    Args:
      version: see `DataConfig.table_version`.
      columns: the number columns to read, in this order, whatever their order in the table; None =
        those of the table.
      context_length: rows with texts that are far longer are refused; None = no limit.

    Raises:
      DataError: there is no table, it cannot be read, or lacks a column or rows.
    """
    path = find_table(Path(path))
    found = read_records(path)
    bad = [BadRow(line, record) for line, record in found if isinstance(record, str)]
    records = [(line, record) for line, record in found if not isinstance(record, str)]
    if records and not any("answer" in record for _, record in records):
        line, record = records[0]
        have = shorten(", ".join(map(repr, record)) or "none")
        raise DataError(
            f"{path}, row {line}: no column 'answer'; it has {have}: "
            "name the column with the answers so"
        )
    present, unused = _number_columns(path, records, columns, version)
    reader, read = _RowReader(path, present, version, context_length), []
    for line, record in records:
        try:
            read.append(reader.read(line, record))
        except InputError as error:
            bad.append(BadRow(line, shorten(str(error), 500)))
    bad.sort()
    if not read and not bad:
        raise DataError(f"{path} has no rows; write one question and its answer a line")
    cause = f"{path}, row {bad[0].line}: {bad[0].reason}; " if bad else f"{path}: "
    if not read:
        raise DataError(f"{cause}no row can be used")
    rows, shared = _split(read, version)
    if empty := [split for split in SPLITS if not rows[split]]:
        raise DataError(
            f"{cause}no row is for {empty[0]}; give at least three different pictures or texts, "
            "or a column 'split' with train, validation and test"
        )
    notes = table_notes(records, unused, shared, reader.cleaned)
    return Table(path, rows, present, tuple(unused), tuple(bad), tuple(notes))


def without_long_rows(table: Table, tokenizer: AnyTokenizer, context_length: int) -> Table:
    """The table with rows that do not fit into a model's context among the bad ones."""
    rows, bad = {}, list(table.bad)
    for split, all_rows in table.rows.items():
        rows[split] = []
        for row in all_rows:
            text = len(tokenizer.encode(row.text or ""))
            # <bos> before the prompt, <eos> after the answer.
            question = 2 + sum(len(tokenizer.encode(t)) for t in (row.prompt, *row.answers))
            name, length = ("text", text) if text > question else ("prompt and answer", question)
            if length <= context_length:
                rows[split].append(row)
                continue
            reason = f"{name}: {length:,} tokens; model.context_length is {context_length:,}"
            bad.append(BadRow(line_of(row), reason))
    return dataclasses.replace(table, rows=rows, bad=tuple(sorted(bad)))


def line_of(row: Row) -> int:
    """The line of the table that the row is from."""
    return int(row.where.rpartition(" ")[-1])


def _number_columns(
    path: Path,
    records: Sequence[tuple[int, Record]],
    wanted: Sequence[str] | None,
    version: int | None,
) -> tuple[tuple[str, ...], dict[str, tuple[int, Any]]]:
    """The additional columns whose values are mostly numbers, or those of them that are `wanted`,
    in that order; and the unused ones, with the line and the value of their first non-number."""
    votes: dict[str, int] = {}
    others: dict[str, tuple[int, Any]] = {}
    for line, record in records:
        for name, value in record.items():
            if name in COLUMNS or is_missing(value):
                continue
            number = parse_number(value, words=version is not None)
            votes[name] = votes.get(name, 0) + (-1 if number is None else 1)
            if number is None:
                others.setdefault(name, (line, value))
    found = tuple(name for name, vote in votes.items() if vote > 0)
    unused = {name: where for name, where in others.items() if name not in found}
    if wanted is None:
        return found, unused
    names = {name.strip(): name for _, record in records for name in record}
    matched = [names[name.strip()] for name in wanted if name.strip() in names]
    # Tables of version None had other rules for which columns hold numbers.
    more = version is not None and not set(found) <= set(matched)
    if len(matched) < len(wanted) or more:
        raise DataError(
            f"{path} has the number columns {shorten(', '.join(found)) or 'none'}, and the "
            f"checkpoint was trained on {shorten(', '.join(wanted)) or 'none'}; give a table with "
            "the same names, in any order"
        )
    return tuple(matched), unused


class _Read(NamedTuple):
    """A row with the split that the table gives it.

    content: equal for rows that show the same. key: the text whose sha256 chooses a split.
    """

    split: str
    content: str
    key: str
    row: Row


class _RowReader:
    """Turns records into rows. A readable picture is opened once, however many rows show it.

    cleaned: the lines of rows whose answer or kind was changed.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], version: int | None, context_length: int | None
    ):
        self._path, self._columns, self._version = path, columns, version
        self._context_length = context_length
        self._digest = functools.cache(_digest)
        self.cleaned: list[int] = []

    def read(self, line: int, record: Record) -> _Read:
        """Raises InputError, naming the field, for a record that cannot be used."""
        names = ("text", "prompt", "answer", "kind", "split", "image")
        text, prompt, answer, kind, split, image = (self._text(line, record, n) for n in names)
        if not answer.strip():
            raise InputError("answer: it is empty; give every row one")
        if (known := _SPLIT_NAMES.get(split.strip().lower())) is None:
            raise InputError(f"split: {quote(split)} is none of {', '.join(SPLITS)}")
        numbers = self._numbers(record)
        if len(image) > _LONGEST_PATH:
            raise InputError(
                f"image: {quote(image)} is no path; save the picture as a file and give its name"
            )
        if image:
            content = self._digest(self._path.parent / image)
        elif text:
            content = json.dumps(text)
        elif not np.isnan(numbers).all():
            content = json.dumps(numbers.tolist())
        else:
            raise InputError("nothing to answer from: give it an image, a text or a number")
        row = Row(
            image=self._path.parent / image if image else None,
            text=text or None,
            numbers=numbers if self._columns else None,
            prompt=prompt,
            answers=(answer,),
            kind=kind or ANY_KIND,
            where=f"{self._path}, row {line}",
        )
        by_name = self._version is None and image
        return _Read(known, content, json.dumps(image) if by_name else content, row)

    def _text(self, line: int, record: Record, name: str) -> str:
        value = record.get(name)
        if value is None or value != value:  # NaN: how data frames write a missing value
            return ""
        if isinstance(value, (bool, int, float)):
            value = json.dumps(value)
        if not isinstance(value, str):
            raise InputError(f"{name}: a {type(value).__name__}; expected a text")
        most, size = _BYTES_PER_TOKEN * (self._context_length or 0), len(value)
        if most and size > most and name in ("text", "prompt", "answer"):
            raise InputError(
                f"{name}: {size:,} letters ({quote(value)}); at most {most:,} are read for "
                f"model.context_length={self._context_length:,}"
            )
        check_text(value, name)
        if self._version is None:
            return value
        if value.lower() in ("true", "false"):  # pandas writes True, JSON true
            return value.lower()
        if name not in ("answer", "kind"):
            return value
        clean = unicodedata.normalize("NFC", value).strip()
        if clean != value and clean:
            self.cleaned.append(line)
        return clean

    def _numbers(self, record: Record) -> np.ndarray:
        numbers = np.full(len(self._columns), math.nan)
        for i, name in enumerate(self._columns):
            value = record.get(name)
            if is_missing(value):
                continue
            number = parse_number(value, words=self._version is not None)
            if number is None:
                advice = "; write it like 1500 or 1.5" if re.search(r"\d", str(value)) else ""
                raise InputError(f"{name}: {quote(value)} is no finite number{advice}")
            numbers[i] = number
        return numbers


def _digest(image: Path) -> str:
    """The sha256 of a picture's file, once its header was read."""
    try:
        check_image(image)
        return hashlib.sha256(image.read_bytes()).hexdigest()
    except InputError as error:
        raise InputError(f"image: {error}") from error
    except OSError as error:
        raise InputError(f"image: {image}: {first_line(error)}") from error


def _split(read: Sequence[_Read], version: int | None) -> tuple[dict[str, list[Row]], list[int]]:
    """The rows by split, and a line of each content that is in more than one split."""
    named = {each.key: each.split for each in reversed(read) if each.split}
    follows = named if version is not None else {}
    places = {e.key: _place(e.key) for e in read if not e.split and e.key not in follows}
    chosen = {key: next(s for s in SPLITS if place < _ENDS[s]) for key, place in places.items()}
    lacking = set(SPLITS) - set(chosen.values()) - {each.split for each in read}
    if lacking and len(chosen) >= len(SPLITS):
        first, *_, last_but_one, last = sorted(places, key=places.__getitem__)
        chosen |= {first: "train", last_but_one: "validation", last: "test"}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    seen: dict[str, str] = {}
    shared: dict[str, int] = {}
    for split, content, key, row in read:
        split = split or follows.get(key) or chosen[key]
        rows[split].append(row)
        if seen.setdefault(content, split) != split:
            shared.setdefault(content, line_of(row))
    return rows, list(shared.values())


def _place(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
