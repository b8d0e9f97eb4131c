"""One's own data: a folder with a table of questions and answers, and pictures.

The table is `*.jsonl` (an object a line) or `*.csv` (a first line of names). Its columns: `answer`;
and, all optional, `prompt`, `image` (a path, from the folder on), `text`, `kind` (of question, for
the report), `split` (train, validation or test). Every other column that holds numbers for the most
part is one auxiliary vector a row; columns of anything else, and of a CSV those without a name (the
index that pandas writes), are left out.
"""

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slam_jax.data.images import check_image
from slam_jax.data.records import DataError
from slam_jax.data.rows import ANY_KIND, Row
from slam_jax.data.tokenizer import Tokenizer, check_text
from slam_jax.errors import InputError, first_line, shorten

SPLITS = ("train", "validation", "test")
_ENDS = {"train": 0.8, "validation": 0.9, "test": 1.0}
_OWN = ("image", "text", "prompt", "answer", "kind", "split")
_MOST_BYTES = 1 << 30


class BadRow(NamedTuple):
    """A row that cannot be used. line: of the table, from 1 on."""

    line: int
    reason: str


class Table(NamedTuple):
    """A table as read.

    rows: by split, those that can be used, each with its place. columns: of numbers. ignored:
    columns that are neither ours nor numbers. bad: the other rows.
    """

    path: Path
    rows: dict[str, list[Row]]
    columns: tuple[str, ...]
    ignored: tuple[str, ...]
    bad: tuple[BadRow, ...]


def read_table(path: str | Path) -> Table:
    """Reads and checks the table of a folder, or the table itself. Pictures are not decoded yet.

    Rows that show the same picture (or without one the same text, or the same numbers) are in the
    same split, which their sha256 chooses: 80% training, 10% validation, 10% test, and it stays
    where rows are added. Of a small table, validation and test have at least one row each.

    Raises:
      DataError: there is no table, it cannot be read, or lacks a column or rows.
    """
    path = _find_table(Path(path))
    columns, ignored = None, ()
    good: list[tuple[str, str, Row]] = []
    bad = []
    for line, record in _records(path):
        if isinstance(record, str):
            bad.append(BadRow(line, record))
            continue
        if "answer" not in record:
            have = ", ".join(map(repr, record)) or "none"
            if not good:
                raise DataError(
                    f"{path}, row {line}: no column 'answer'; it has {shorten(have)}: "
                    "name the column with the answers so"
                )
        if columns is None:
            columns, ignored = _columns_of_numbers(path)
        try:
            split, key, row = _row(path.parent, record, columns)
            good.append((split, key, row._replace(where=f"{path}, row {line}")))
        except InputError as error:
            bad.append(BadRow(line, str(error)))
    if not good:
        if bad:
            raise DataError(f"{path}, row {bad[0].line}: {bad[0].reason}; no row can be used")
        raise DataError(f"{path} has no rows; write one question and its answer a line")
    rows = _split(good)
    return Table(path, rows, columns or (), ignored, tuple(bad))


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
            bad.append(BadRow(int(row.where.rpartition(" ")[-1]), reason))
    return table._replace(rows=rows, bad=tuple(sorted(bad)))


def _find_table(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give data.path a folder with a .jsonl or .csv")
    tables = sorted(p for p in path.iterdir() if p.suffix.lower() in (".jsonl", ".csv"))
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise DataError(
            f"{path}: expected one .jsonl or .csv in it, found {shorten(found)}; "
            "give data.path the table itself"
        )
    return tables[0]


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """(line, record), or in its place what is wrong with it; empty lines are passed over."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; split it: 1 GiB is read")
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, restval="")
                for record in reader:
                    more = None in record
                    record.pop("", None)  # an index says nothing of its row
                    yield reader.line_num, "more values than columns" if more else record
            return
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _parse(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error


def _parse(text: str) -> Mapping[str, Any] | str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({first_line(error)})"
    if not isinstance(record, dict):
        return f"a {type(record).__name__}; expected an object such as " + '{"answer": "yes"}'
    return record


def _columns_of_numbers(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns besides ours, in order: those that hold numbers for the most part, and the others."""
    votes: dict[str, int] = {}
    for _, record in _records(path):
        if isinstance(record, str):
            continue
        for name, value in record.items():
            if name not in _OWN and not _is_empty(value):
                votes[name] = votes.get(name, 0) + (1 if _number(value) is not None else -1)
    return (
        tuple(name for name, vote in votes.items() if vote > 0),
        tuple(name for name, vote in votes.items() if vote <= 0),
    )


def _row(folder: Path, record: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, str, Row]:
    """The split given, what else chooses it, and the row; raises InputError naming the field."""
    texts = {name: _text(record, name) for name in ("text", "prompt", "answer", "kind", "split")}
    if not texts["answer"]:
        raise InputError("answer: it is empty; give every row one")
    if texts["split"] not in ("", *SPLITS):
        raise InputError(f"split: {texts['split']!r} is none of {', '.join(SPLITS)}")
    numbers = np.full(len(columns), math.nan)
    for i, name in enumerate(columns):
        value = record.get(name)
        if not _is_empty(value):
            number = _number(value)
            if number is None:
                raise InputError(f"{name}: {shorten(repr(value), 60)} is no finite number")
            numbers[i] = number
    image = _text(record, "image")
    if image:
        try:
            check_image(folder / image)
        except InputError as error:
            raise InputError(f"image: {error}") from None
    if not image and not texts["text"] and np.isnan(numbers).all():
        raise InputError("nothing to answer from: give it an image, a text or a number")
    shown = image or texts["text"] or numbers.tolist()
    row = Row(
        image=folder / image if image else None,
        text=texts["text"] or None,
        numbers=numbers if columns else None,
        prompt=texts["prompt"],
        answers=(texts["answer"],),
        kind=texts["kind"] or ANY_KIND,
    )
    return texts["split"], json.dumps(shown), row


def _split(good: Sequence[tuple[str, str, Row]]) -> dict[str, list[Row]]:
    places = {key: _place(key) for split, key, _ in good if not split}
    chosen = {key: next(s for s in SPLITS if place < _ENDS[s]) for key, place in places.items()}
    lacking = set(SPLITS) - set(chosen.values()) - {split for split, _, _ in good}
    if lacking and len(chosen) >= len(SPLITS):
        first, *_, last_but_one, last = sorted(places, key=places.__getitem__)
        chosen |= {first: "train", last_but_one: "validation", last: "test"}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split, key, row in good:
        rows[split or chosen[key]].append(row)
    for split in SPLITS:
        if not rows[split]:
            raise DataError(
                f"no row is for {split}; give at least three different pictures or texts, or a "
                "column 'split' with train, validation and test"
            )
    return rows


def _place(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise InputError(f"{name}: a {type(value).__name__}; expected a text")
    check_text(value, name)
    return value


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else; True is 1."""
    if not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
