"""Parts of a data set: rows that fit into a model, joined into three splits."""

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slam_jax.data.config import DataConfig
from slam_jax.data.folder import (
    SPLITS,
    Table,
    line_of,
    without_long_rows,
    without_many_pictures,
)
from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.notes import outlier_notes
from slam_jax.data.numbers import AuxFormat
from slam_jax.data.pipeline import Source
from slam_jax.data.records import DataError, Joined, Mapped
from slam_jax.data.rows import Lengths, Row, Rows, TokenCounts
from slam_jax.errors import require
from slam_jax.slam_v3.config import SlamV3Config


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits, the tokenizer of their text and the format of their auxiliary vectors.

    corpus_is_whole: whether none of the records that a tokenizer is trained on is damaged, so that
    the same data give the same tokenizer. table: the table of a folder. notes: what the user should
    know about the data, one line each. tables: those of all folders of a mixture.
    """

    train: Source
    validation: Source
    test: Source
    tokenizer: AnyTokenizer
    aux_format: AuxFormat | None = None
    corpus_is_whole: bool = True
    table: Table | None = None
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the data: the number of rows by split, and the sha256 of tables."""
        found: dict[str, Any] = {"rows": {name: len(getattr(self, name)) for name in SPLITS}}
        hashes = [table.sha256() for table in self.tables]
        if len(hashes) == 1:
            found["sha256"] = hashes[0]
        elif hashes:
            found["sha256"] = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        return found


class Part(NamedTuple):
    """Rows of a data set by split, all of which fit into the model's context.

    counts: the tokens of each row by split, or `lengths`: bounds of them. columns: those of
    numbers. streams: the inputs that some row has. lacking: those that some row lacks.
    """

    name: str
    rows: Mapping[str, Sequence[Any]]
    streams: Sequence[str]
    lacking: Sequence[str] = ()
    columns: tuple[str, ...] = ()
    counts: Mapping[str, TokenCounts] | None = None
    lengths: Lengths | None = None
    table: Table | None = None


def fit_table(
    table: Table, config: DataConfig, model: SlamV3Config, tokenizer: AnyTokenizer
) -> Part:
    """A table without its bad rows. Raises DataError where there are too many of them."""
    before = {split for split, rows in table.rows.items() if rows}
    table = without_many_pictures(table, model.image.max_images)
    table, counts = without_long_rows(table, tokenizer, model.context_length)
    _check_table(table, config, model, before)
    all_rows = [row for rows in table.rows.values() for row in rows]
    lacks = {
        "image": [row.image is None for row in all_rows],
        "text": [row.text is None for row in all_rows],
        "aux": [row.numbers is None or np.isnan(row.numbers).any() for row in all_rows],
    }
    streams = [name for name, missing in lacks.items() if not all(missing)]
    if table.columns:
        streams = list(dict.fromkeys((*streams, "aux")))
    lacking = [name for name in streams if any(lacks[name])]
    return Part(str(table.path), table.rows, streams, lacking, table.columns, counts, table=table)


def with_columns(part: Part, columns: tuple[str, ...]) -> Part:
    """The part with the number columns of a whole mixture; a row has NaN for those of others."""
    if part.columns == columns:
        return part
    places = [columns.index(name) for name in part.columns]

    def widen(row: Row) -> Row:
        numbers = np.full(len(columns), np.nan)
        if row.numbers is not None:
            numbers[places] = row.numbers
        return row._replace(numbers=numbers)

    rows = {
        split: list(map(widen, each)) if isinstance(each, list) else Mapped(each, widen)
        for split, each in part.rows.items()
    }
    lacking = tuple(dict.fromkeys((*part.lacking, "aux")))
    return part._replace(rows=rows, columns=columns, lacking=lacking)


def join(
    parts: Sequence[Part],
    config: DataConfig,
    model: SlamV3Config,
    tokenizer: AnyTokenizer,
    aux_format: AuxFormat | None,
) -> Dataset:
    """The data set of all parts; rows of training are drawn by the weights of `config.mixture`."""
    streams = list(dict.fromkeys(name for part in parts for name in part.streams))
    lacking = [
        name
        for name in streams
        if any(name not in part.streams or name in part.lacking for part in parts)
    ]
    tables = tuple(part.table for part in parts if part.table is not None)
    notes = tuple(note for table in tables for note in table.notes)
    columns = parts[0].columns
    if aux_format is None and columns:
        robust = config.table_version is not None
        rows = [
            r for part in parts for r in part.rows["train"] if isinstance(part.rows["train"], list)
        ]
        numbers = np.array([row.numbers for row in rows])
        aux_format = AuxFormat.of_columns(columns, numbers, robust=robust)
        notes += tuple(outlier_notes(columns, numbers, list(map(line_of, rows)), robust))
    known = _lengths_of(parts, tokenizer)
    rows = {split: _joined([part.rows[split] for part in parts]) for split in SPLITS}
    name = parts[0].name if len(parts) == 1 else "data.mixture"
    weights = [weight for _, weight in config.mixture]
    sizes = [(len(p.rows["train"]), w) for p, w in zip(parts, weights, strict=bool(weights))]
    dataset = _from_rows(
        rows,
        name,
        config,
        model,
        tokenizer,
        streams,
        aux_format,
        lacking=lacking,
        known=known,
        weights=sizes,
    )
    table = tables[0] if len(parts) == len(tables) == 1 else None
    return dataclasses.replace(dataset, table=table, tables=tables, notes=notes)


def _lengths_of(parts: Sequence[Part], tokenizer: AnyTokenizer) -> dict[str, dict[str, Any]]:
    """The arguments of `Rows` about lengths, by split: counts of all rows, or else bounds."""
    found = {}
    for split in SPLITS:
        counts = [part.counts[split] for part in parts if part.counts is not None]
        if len(counts) == len(parts):
            joined = TokenCounts(*map(np.concatenate, zip(*counts, strict=True)))
            found[split] = {"counted": (tokenizer, joined)}
            continue
        bounds = [*(each.lengths() for each in counts), *(p.lengths for p in parts if p.lengths)]
        texts, questions, answers = zip(*bounds, strict=True)
        low, high = zip(*texts, strict=True)
        lengths = Lengths((min(low), max(high)), max(questions), max(answers))
        found[split] = {"lengths": lengths}
    return found


def _joined(sequences: Sequence[Sequence[Any]]) -> Sequence[Any]:
    if len(sequences) == 1:
        return sequences[0]
    if all(isinstance(each, list) for each in sequences):
        return list(itertools.chain.from_iterable(sequences))
    return Joined(sequences)


def check_numbers(columns: Sequence[str], where: str, model: SlamV3Config) -> None:
    """Raises ConfigError where the model cannot read the columns of numbers."""
    slots = (
        f"True, as {where} has columns of numbers ({', '.join(columns)}) and each is a slot; "
        "or data.columns.numbers=() to leave them out"
    )
    require(model.aux_slots or not columns, "model.aux_slots", model.aux_slots, slots)
    count = len(columns)
    most = f"at least {count}, as {where} has {count} columns of numbers"
    require(count <= model.max_aux, "model.max_aux", model.max_aux, most)


def _check_table(
    table: Table, config: DataConfig, model: SlamV3Config, needed: Collection[str]
) -> None:
    """Raises an error if too few rows can be used."""
    path, bad = table.path, table.bad
    if bad:
        line, reason = bad[0]
        first = f"row {line}: {reason}" + (f" (and {len(bad) - 1} more such)" if bad[1:] else "")
        if len(bad) > config.max_damaged_records:
            raise DataError(
                f"{path}, {first}; repair it, or let "
                f"data.max_damaged_records={len(bad)} rows be skipped"
            )
        for split in SPLITS:
            if split in needed and not table.rows[split]:
                raise DataError(f"{path}: no row is left for {split}; {first}")
    for line, reason in bad:
        logging.getLogger("slam_jax").warning("%s, row %d is skipped: %s", path, line, reason)


def _from_rows(
    splits: Mapping[str, Sequence[Any]],
    name: str,
    config: DataConfig,
    model: SlamV3Config,
    tokenizer: AnyTokenizer,
    streams: Sequence[str],
    aux_format: AuxFormat | None,
    *,
    lacking: Sequence[str],
    known: Mapping[str, Mapping[str, Any]],
    weights: Sequence[tuple[int, float]],
) -> Dataset:
    """The data set of these rows by split. Other arguments: those of `Rows`, `known` by split."""
    train, validation, test = (
        Rows(
            splits[split],
            f"{name}, {split}",
            config if split == "train" else config.plain,
            model,
            streams=streams,
            lacking=lacking,
            aux_format=aux_format,
            weights=weights if split == "train" else (),
            **known[split],
        )
        for split in SPLITS
    )
    return Dataset(train, validation, test, tokenizer, aux_format)
