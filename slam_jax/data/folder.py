"""Data of one's own: a folder with questions and answers, and pictures.

`slam_jax.data.formats` recognises the format. The columns of a table `*.jsonl`, `*.json`, `*.csv`
or `*.tsv`, whose names `data.columns` can change:

    answer   the answer; blanks around it are removed and accents composed (Unicode NFC). Or a list
             of right answers, also in a column `answers`
    prompt   the question; optional, as are all that follow
    image    the path of a picture, relative to the folder, or a list of paths
    text     a text that the question is about
    kind     the kind of question, for the report
    split    train, validation or test; `val`, `dev`, `training` and the like are understood

Every other column whose values are mostly numbers gives one auxiliary vector a row. Empty values,
`NA` and `nan` are missing numbers; true and false are 1 and 0. Other columns are not used, nor are
columns of a CSV without a name (the index that pandas writes).
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slam_jax.data.columns import choose_columns
from slam_jax.data.config import ColumnsConfig
from slam_jax.data.formats import Found, Located, find
from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.images import as_pictures
from slam_jax.data.notes import table_notes
from slam_jax.data.records import DataError
from slam_jax.data.row_reader import RowReader
from slam_jax.data.rows import Row, TokenCounts, count_tokens, too_many
from slam_jax.data.splits import SPLITS, Read, divide, line_of
from slam_jax.errors import InputError, shorten
from slam_jax.runtime.files import sha256

__all__ = [
    "SPLITS",
    "BadRow",
    "Table",
    "line_of",
    "read_table",
    "without_long_rows",
    "without_many_pictures",
]

_MOST_HASHED_BYTES = 1 << 30


class BadRow(NamedTuple):
    """A row that cannot be used. line: its line in the table, from 1 on."""

    line: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A folder or a table as read.

    path: of the table, or of the folder where there are several files. rows: the usable rows by
    split. columns: the columns of numbers. ignored: the columns that are not used. bad: the rows
    that cannot be used. notes: what the user should know, one line each. format: its name. read:
    the other columns that are used, ours -> their name. files: those that hold the data. shared:
    how many pictures or texts are in more than one split. compared: whether pictures were compared
    for that. made: splits that were made of training rows.
    """

    path: Path
    rows: dict[str, list[Row]]
    columns: tuple[str, ...]
    ignored: tuple[str, ...]
    bad: tuple[BadRow, ...]
    notes: tuple[str, ...] = ()
    format: str = "table"
    read: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()
    shared: int = 0
    compared: bool = True
    made: tuple[str, ...] = ()

    def sha256(self) -> str:
        """The sha256 of the file. For several files: of their names, each with its sha256, or with
        its size where they have more than 1 GiB together or hold pictures."""
        files = [each for file in self.files for each in _files_in(file)]
        sizes = [file.stat().st_size for file in files]
        whole = sum(sizes) <= _MOST_HASHED_BYTES and len(files) == len(self.files)
        if whole and len(files) == 1:
            return sha256(files[0])
        lines = [
            f"{file.relative_to(self.path) if file != self.path else file.name} "
            f"{sha256(file) if whole else size}"
            for file, size in zip(files, sizes, strict=True)
        ]
        named = "\n".join(sorted(lines)).encode(errors="surrogatepass")
        return hashlib.sha256(named).hexdigest()


def read_table(
    path: str | Path,
    *,
    version: int | None = 2,
    columns: Sequence[str] | None = None,
    context_length: int | None = None,
    names: ColumnsConfig | None = None,
    required: Sequence[str] = SPLITS,
    cache: Path | None = None,
) -> Table:
    """Reads and checks the data of a folder, or a file of it. Pictures are not decoded yet.

    Rows that show the same picture (or without one the same text, or the same numbers) are in the
    same split: the one given for any of them, else the one that the sha256 of the picture's file
    or the text chooses: 80% training, 10% validation, 10% test. Rows stay in their split when
    others are added. In a small table, validation and test have at least one row each.

    Args:
      version: see `DataConfig.table_version`.
      columns: the number columns to read, in this order, whatever their order in the table; None =
        those of the table.
      context_length: rows with texts that are far longer are refused; None = no limit.
      names: the names of the columns.
      required: the splits that must have rows.
      cache: the folder for indices of tar shards; None = none are kept.

    Raises:
      ConfigError: `names` has a column that is not there, or a library is missing.
      DataError: there is no data, it cannot be read, or lacks a column or rows.
    """
    found = find(Path(path), cache)
    names = names or ColumnsConfig()
    chosen = choose_columns(found, names, version=version, wanted=columns)
    reader = RowReader(found, chosen, version, context_length)
    read, bad = _read_rows(found, reader)
    path = found.path
    if not read and not bad:
        raise DataError(f"{path} has no rows; write one question and its answer a line")
    cause = f"{path}, row {bad[0].line}: {bad[0].reason}; " if bad else f"{path}: "
    if not read:
        raise DataError(f"{cause}no row can be used")
    divided = divide(read, version)
    if empty := [split for split in required if not divided.rows[split]]:
        raise DataError(
            f"{cause}no row is for {empty[0]}; give at least three different pictures or texts, "
            "or a column 'split' with train, validation and test"
        )
    notes = table_notes(chosen, divided, reader.cleaned, compared=found.compared)
    return Table(
        *(path, divided.rows, chosen.numbers, tuple(chosen.unused), tuple(bad)),
        notes=(*found.notes, *notes),
        format=found.name,
        read=chosen.read,
        files=found.files,
        shared=len(divided.shared),
        compared=found.compared,
        made=divided.made,
    )


def without_long_rows(
    table: Table, tokenizer: AnyTokenizer, context_length: int
) -> tuple[Table, dict[str, TokenCounts]]:
    """The table with rows that do not fit into a model's context among the bad ones, and the
    numbers of tokens of the other rows by split."""
    rows, bad, counts = {}, list(table.bad), {}
    for split, all_rows in table.rows.items():
        found = count_tokens(all_rows, tokenizer)
        # <bos> before the prompt, <eos> after the answer.
        longest = np.maximum(found.text, found.question + 2)
        fits = longest <= context_length
        for i in np.flatnonzero(~fits).tolist():
            is_text = found.text[i] > found.question[i] + 2
            name = "text" if is_text else "prompt and answer"
            reason = f"{name}: {longest[i]:,} tokens; model.context_length is {context_length:,}"
            bad.append(BadRow(line_of(all_rows[i]), reason))
        rows[split] = [all_rows[i] for i in np.flatnonzero(fits).tolist()]
        counts[split] = TokenCounts(*(each[fits] for each in found))
    return dataclasses.replace(table, rows=rows, bad=tuple(sorted(bad))), counts


def without_many_pictures(table: Table, most: int) -> Table:
    """The table with rows of more than `most` pictures among the bad ones."""
    rows, bad = {}, list(table.bad)
    for split, all_rows in table.rows.items():
        counts = [len(as_pictures(row.image)) for row in all_rows]
        pairs = list(zip(all_rows, counts, strict=True))
        rows[split] = [row for row, count in pairs if count <= most]
        bad += [
            BadRow(line_of(row), f"image: {too_many(count, most)}")
            for row, count in pairs
            if count > most
        ]
    return dataclasses.replace(table, rows=rows, bad=tuple(sorted(bad)))


def _read_rows(found: Found, reader: RowReader) -> tuple[list[Read], list[BadRow]]:
    read, bad = [], []
    for located in found.read():
        try:
            if isinstance(located.record, str):
                raise InputError(located.record)
            read.append(reader.read(located))
        except InputError as error:
            reason = shorten(f"{_place(found, located)}{error}", 500)
            bad.append(BadRow(located.line, reason))
    return read, sorted(bad)


def _place(found: Found, located: Located) -> str:
    """The file of a row in messages, where there are several."""
    if len(found.files) < 2 or located.file not in found.files:
        return ""
    return f"{located.file.relative_to(found.path)}: "


def _files_in(path: Path) -> list[Path]:
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
