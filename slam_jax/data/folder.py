"""Data of one's own: a folder with a table of questions and answers, and pictures.

The table is `*.jsonl` (an object a line) or `*.csv` (a header with the names first). Its columns:

    answer   the answer; blanks around it are removed and accents composed (Unicode NFC)
    prompt   the question; optional, as are all that follow
    image    the path of a picture, relative to the folder
    text     a text that the question is about
    kind     of question, for the report
    split    train, validation or test; `val`, `dev`, `training` and the like are understood

Every other column of which most values are numbers makes one auxiliary vector a row. Empty values,
`NA` and `nan` are missing numbers; true and false are 1 and 0. Other columns are not used, nor are
columns of a CSV without a name (the index that pandas writes).
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slam_jax.data.images import check_image
from slam_jax.data.numbers import is_missing, parse_number
from slam_jax.data.records import DataError
from slam_jax.data.rows import ANY_KIND, Row
from slam_jax.data.tables import Record, find_table, quote, read_records
from slam_jax.data.tokenizer import Tokenizer, check_text
from slam_jax.errors import InputError, first_line, shorten

SPLITS = ("train", "validation", "test")
_ENDS = {"train": 0.8, "validation": 0.9, "test": 1.0}
_SPLIT_NAMES = {
    **{name: name for name in ("", *SPLITS)},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("val", "valid", "dev", "development"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
# Our columns, each with names that other tables have for it.
_OWN = {
    "image": ("imagepath", "imagefile", "filename", "file", "path", "picture", "photo", "img"),
    "text": ("context", "passage", "sentence", "document"),
    "prompt": ("question", "query", "instruction"),
    "answer": ("label", "target", "output", "response", "caption", "class"),
    "kind": ("type", "category"),
    "split": ("subset", "fold", "partition"),
}
# A token is rarely longer; training a tokenizer takes time that grows with the square of a word.
_BYTES_PER_TOKEN = 16
_LONGEST_PATH = 1_000
_MOST_NAMED = 8


class BadRow(NamedTuple):
    """A row that cannot be used. line: of the table, from 1 on."""

    line: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as read.

    rows: the usable ones by split. columns: of numbers. ignored: columns that are not used.
    bad: the rows that cannot be used. notes: what the user should know, one line each.
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
    or the text chooses: 80% training, 10% validation, 10% test. Rows stay in their split where
    others are added. Of a small table, validation and test have at least one row each.

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
    _require_answers(path, records)
    present, unused = _number_columns(records, version)
    if columns is not None:
        present = _match_columns(path, columns, present, records, version)
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
    notes = (_unused_note(unused, records), _shared_note(shared), reader.note())
    kept = tuple(note for note in notes if note)
    return Table(path, rows, present, tuple(unused), tuple(bad), kept)


def without_long_rows(table: Table, tokenizer: Tokenizer, context_length: int) -> Table:
    """The table with rows that do not fit into a model's context among the bad ones."""
    rows, bad = {}, list(table.bad)
    for split, given in table.rows.items():
        rows[split] = []
        for row in given:
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


def _require_answers(path: Path, records: Sequence[tuple[int, Record]]) -> None:
    if records and not any("answer" in record for _, record in records):
        line, record = records[0]
        have = shorten(", ".join(map(repr, record)) or "none")
        raise DataError(
            f"{path}, row {line}: no column 'answer'; it has {have}: "
            "name the column with the answers so"
        )


def _number_columns(
    records: Sequence[tuple[int, Record]], version: int | None
) -> tuple[tuple[str, ...], dict[str, tuple[int, Any]]]:
    """The columns besides ours of which most values are numbers, in order; and the others, each
    with the line and the value of its first that is none."""
    votes: dict[str, int] = {}
    others: dict[str, tuple[int, Any]] = {}
    for line, record in records:
        for name, value in record.items():
            if name in _OWN or is_missing(value):
                continue
            number = parse_number(value, words=version is not None)
            votes[name] = votes.get(name, 0) + (-1 if number is None else 1)
            if number is None:
                others.setdefault(name, (line, value))
    numbers = tuple(name for name, vote in votes.items() if vote > 0)
    return numbers, {name: where for name, where in others.items() if name not in numbers}


def _match_columns(
    path: Path,
    wanted: Sequence[str],
    found: Sequence[str],
    records: Sequence[tuple[int, Record]],
    version: int | None,
) -> tuple[str, ...]:
    """The table's names of the columns that a checkpoint was trained on, in the order it knows."""
    names = {name.strip(): name for _, record in records for name in record}
    matched = [names.get(name.strip()) for name in wanted]
    # Tables of version None had other rules for which columns hold numbers.
    more = version is not None and not set(found) <= set(matched)
    if None in matched or more:
        raise DataError(
            f"{path} has the number columns {shorten(', '.join(found)) or 'none'}, and the "
            f"checkpoint was trained on {shorten(', '.join(wanted)) or 'none'}; give a table with "
            "the same names, in any order"
        )
    return tuple(name for name in matched if name is not None)


class _Read(NamedTuple):
    """A row with its line, the split that the table gives it, what it shows (equal for equal
    pictures), and the text whose sha256 chooses a split."""

    line: int
    split: str
    content: str
    key: str
    row: Row


class _RowReader:
    """Turns records into rows. A picture is opened once, however many rows show it."""

    def __init__(
        self, path: Path, columns: Sequence[str], version: int | None, context_length: int | None
    ):
        self._path, self._columns, self._version = path, columns, version
        self._context_length = context_length
        self._digests: dict[Path, str | InputError] = {}
        self._cleaned: list[int] = []

    def read(self, line: int, record: Record) -> _Read:
        """Raises InputError, naming the field, for a record that cannot be used."""
        names = ("text", "prompt", "answer", "kind", "split", "image")
        text, prompt, answer, kind, split, image = (self._text(line, record, n) for n in names)
        if not answer.strip():
            raise InputError("answer: it is empty; give every row one")
        if (known := _SPLIT_NAMES.get(split.strip().lower())) is None:
            raise InputError(f"split: {quote(split)} is none of {', '.join(SPLITS)}")
        numbers = self._numbers(record)
        if image:
            content = self._digest(image)
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
        return _Read(line, known, content, json.dumps(image) if by_name else content, row)

    def note(self) -> str:
        """What was changed in answers, or ""."""
        if not self._cleaned:
            return ""
        return (
            f"answers and kinds read without the blanks around them, accents composed: "
            f"{len(self._cleaned):,} (first in row {self._cleaned[0]})"
        )

    def _text(self, line: int, record: Record, name: str) -> str:
        value = record.get(name)
        if value is None or value != value:  # NaN: how data frames write that nothing is there
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
            self._cleaned.append(line)
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

    def _digest(self, image: str) -> str:
        """The sha256 of a picture's file, once its header was read."""
        if len(image) > _LONGEST_PATH:
            raise InputError(
                f"image: {quote(image)} is no path; save the picture as a file and give its name"
            )
        path = self._path.parent / image
        if path not in self._digests:
            try:
                check_image(path)
                self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            except InputError as error:
                self._digests[path] = InputError(f"image: {error}")
            except OSError as error:
                self._digests[path] = InputError(f"image: {path}: {first_line(error)}")
        digest = self._digests[path]
        if isinstance(digest, InputError):
            raise digest
        return digest


def _split(read: Sequence[_Read], version: int | None) -> tuple[dict[str, list[Row]], list[int]]:
    """The rows by split, and a line of each content that is in more than one split."""
    given = {each.key: each.split for each in reversed(read) if each.split}
    follows = given if version is not None else {}
    places = {e.key: _place(e.key) for e in read if not e.split and e.key not in follows}
    chosen = {key: next(s for s in SPLITS if place < _ENDS[s]) for key, place in places.items()}
    lacking = set(SPLITS) - set(chosen.values()) - {each.split for each in read}
    if lacking and len(chosen) >= len(SPLITS):
        first, *_, last_but_one, last = sorted(places, key=places.__getitem__)
        chosen |= {first: "train", last_but_one: "validation", last: "test"}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    seen: dict[str, str] = {}
    shared: dict[str, int] = {}
    for line, split, content, key, row in read:
        split = split or follows.get(key) or chosen[key]
        rows[split].append(row)
        if seen.setdefault(content, split) != split:
            shared.setdefault(content, line)
    return rows, list(shared.values())


def _place(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _unused_note(
    unused: Mapping[str, tuple[int, Any]], records: Sequence[tuple[int, Record]]
) -> str:
    """Which columns are not used and why, or ""."""
    present = {name for _, record in records for name in record}
    parts = []
    for name, (line, value) in list(unused.items())[:_MOST_NAMED]:
        near = _nearest(name, [own for own in _OWN if own not in present])
        hint = f"; did you mean {near!r}?" if near else ""
        parts.append(f"{quote(name)} (row {line}: {quote(value)} is no number{hint})")
    if more := len(unused) - len(parts):
        parts.append(f"and {more} more")
    return f"columns that are not used: {', '.join(parts)}" if parts else ""


def _nearest(name: str, known: Sequence[str]) -> str | None:
    plain = re.sub(r"[\W_]", "", name.lower())
    for own in known:
        if plain in (own, *_OWN[own]):
            return own
    return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.75)), None)


def _shared_note(lines: Sequence[int]) -> str:
    if not lines:
        return ""
    return (
        f"pictures or texts that are in more than one split: {len(lines):,} (first told by row "
        f"{min(lines)}); scores on them are too good, so give all rows of one the same split"
    )
