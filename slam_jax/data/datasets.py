"""The data sets a config can name, built or read on first use."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slam_jax.data.built import build_once, open_splits
from slam_jax.data.config import DataConfig
from slam_jax.data.digits import read_digits
from slam_jax.data.folder import SPLITS, Table, line_of, read_table, without_long_rows
from slam_jax.data.numbers import AuxFormat, find_outliers
from slam_jax.data.pipeline import Source
from slam_jax.data.public import (
    MNIST_TEXTS,
    read_captions,
    read_mnist,
    with_fitting_answers,
)
from slam_jax.data.records import DataError, Records
from slam_jax.data.rows import Row, Rows
from slam_jax.data.scenes import Scenes
from slam_jax.data.sort_of_clevr import COLOURS, SHAPES, SIZE, SortOfClevr
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.data.views import VIEWS
from slam_jax.errors import ConfigError
from slam_jax.slam_v3.config import SlamV3Config


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits, the tokenizer of their text and the format of their auxiliary vectors.

    corpus_is_whole: no record that a tokenizer is trained on is damaged, so that the same data give
    the same tokenizer. table: of a folder. notes: what the user should know of the data.
    """

    train: Source
    validation: Source
    test: Source
    tokenizer: Tokenizer
    aux_format: AuxFormat | None = None
    corpus_is_whole: bool = True
    table: Table | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a reader is to read, for which model, and what a checkpoint has of it already."""

    config: DataConfig
    variant: str
    model: SlamV3Config
    tokenizer: Tokenizer | None
    aux_format: AuxFormat | None

    def tokenizer_of(self, texts: Iterable[str]) -> Tokenizer:
        return self.tokenizer or Tokenizer.train(texts, self.config.vocab_size)


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    *,
    aux_format: AuxFormat | None = None,
    model: SlamV3Config | None = None,
) -> Dataset:
    """The data set `config.name`, built in `config.directory` if it is not there yet.

    Args:
      config: `sort_of_clevr`, or `sort_of_clevr/tiny` for trying out; `folder` with `config.path`,
        for data of one's own; `digits`; `mnist` and `coco_captions`, which TFDS downloads, and
        builds with TensorFlow.
      tokenizer, aux_format: those of a checkpoint; None makes them of the training split.
      model: what will read it: the size of images, the width of auxiliary vectors, the context.

    Raises:
      ConfigError: if there is no data set of that name, or it cannot show what a stage asks for.
      DataError: if it can neither be read nor built.
    """
    name, _, variant = config.name.partition("/")
    reader = _READERS.get(name)
    if reader is None or (variant and name != "sort_of_clevr"):
        raise ConfigError(f"data.name is {config.name!r}; use one of {', '.join(_READERS)}")
    for field in ("augment", "drop_inputs"):
        if getattr(config, field) and name == SortOfClevr.name:
            raise ConfigError(f"data.{field} is {getattr(config, field)}; for {name} it must be 0")
    model = model or SlamV3Config(vocab_size=1)
    dataset = reader(_Wanted(config, variant, model, tokenizer, aux_format))
    for view in config.views:
        if view not in dataset.train.views:
            known = ", ".join(dataset.train.views)
            raise ConfigError(f"data.stages use the view {view!r}; {config.name} has {known}")
    return dataset


def _read_sort_of_clevr(wanted: _Wanted) -> Dataset:
    variants = {known.name: known for known in SortOfClevr.BUILDER_CONFIGS}
    config, chosen = wanted.config, variants.get(wanted.variant or "full")
    if chosen is None:
        known = ", ".join(f"sort_of_clevr/{v}" for v in variants)
        raise ConfigError(f"data.name is {config.name!r}; use sort_of_clevr or one of {known}")
    size = wanted.model.image.size
    if size != SIZE and any("image" in VIEWS[view].streams for view in config.views):
        raise ConfigError(
            f"model.image.size is {size}, and the pictures of {config.name} have {SIZE} pixels a "
            f"side; set it to {SIZE}"
        )
    build_once(
        config,
        functools.partial(SortOfClevr, config=chosen.name),
        chosen.train + chosen.validation + chosen.test,
    )
    name = f"{SortOfClevr.name}/{chosen.name}"
    splits = [
        Records(records, f"{name}, {split}", config.max_damaged_records)
        for split, records in zip(SPLITS, open_splits(config, name, SPLITS), strict=True)
    ]
    train, validation, test = map(Scenes, splits)
    tokenizer = wanted.tokenizer_of(train.corpus())
    aux_format = AuxFormat((*COLOURS, *SHAPES, "x", "y"))
    return Dataset(
        train, validation, test, tokenizer, aux_format, corpus_is_whole=not splits[0].damaged
    )


def _read_folder(wanted: _Wanted) -> Dataset:
    config, model = wanted.config, wanted.model
    if config.path is None:
        raise ConfigError("data.path is not given; give it the folder with your table")
    trained = wanted.aux_format
    columns = () if trained is None or not trained.has_columns else trained.names
    table = read_table(
        config.path,
        version=config.table_version,
        # Without a tokenizer there is no checkpoint, and the table says which columns there are.
        columns=None if wanted.tokenizer is None else columns,
        context_length=model.context_length,
    )
    tokenizer = wanted.tokenizer_of(_texts(table.rows["train"]))
    table = without_long_rows(table, tokenizer, model.context_length)
    _skip_bad_rows(table, config.max_damaged_records)
    for split, kept in table.rows.items():
        if not kept:
            raise DataError(f"{table.path}: no row is left for {split}; repair the bad ones")
    if table.columns and not model.aux_slots:
        raise ConfigError(
            f"model.aux_slots is False, and {table.path} has columns of numbers "
            f"({', '.join(table.columns)}), of which each is a slot; set it to True"
        )
    if len(table.columns) > model.max_aux:
        raise ConfigError(
            f"model.max_aux is {model.max_aux}, and {table.path} has {len(table.columns)} columns "
            "of numbers; raise it"
        )
    rows = table.rows
    given = [row for kept in rows.values() for row in kept]
    lacks = {
        "image": [row.image is None for row in given],
        "text": [row.text is None for row in given],
        "aux": [row.numbers is None or np.isnan(row.numbers).any() for row in given],
    }
    streams = [name for name, missing in lacks.items() if not all(missing)]
    aux_format, notes = wanted.aux_format, list(table.notes)
    if aux_format is None and table.columns:
        streams = list(dict.fromkeys((*streams, "aux")))
        robust = config.table_version is not None
        numbers = np.array([row.numbers for row in rows["train"]])
        aux_format = AuxFormat.of_columns(table.columns, numbers, robust=robust)
        notes += _outlier_notes(table, numbers, robust)
    for note in notes:
        logging.getLogger("slam_jax").warning("%s: %s", table.path, note)
    dataset = _from_rows(
        wanted,
        rows,
        str(table.path),
        tokenizer,
        streams=streams,
        aux_format=aux_format,
        lacking=[name for name in streams if any(lacks[name])],
    )
    return dataclasses.replace(dataset, table=table, notes=tuple(notes))


def _outlier_notes(table: Table, numbers: np.ndarray, robust: bool) -> Iterator[str]:
    effect = "left out of mean and scale" if robust else "the other numbers hardly differ for it"
    for name, column in zip(table.columns, numbers.T, strict=True):
        (places,) = np.nonzero(find_outliers(column))
        if len(places):
            line = line_of(table.rows["train"][places[0]])
            yield (
                f"column {name!r}: {len(places):,} of {len(column):,} training numbers far from "
                f"the others, {effect} (first in row {line}: {column[places[0]]:.6g})"
            )


def _skip_bad_rows(table: Table, most: int) -> None:
    if len(table.bad) > most:
        line, reason = table.bad[0]
        more = f" (and {len(table.bad) - 1} more such)" if len(table.bad) > 1 else ""
        raise DataError(
            f"{table.path}, row {line}: {reason}{more}; repair it, or let "
            f"data.max_damaged_records={len(table.bad)} rows be skipped"
        )
    for line, reason in table.bad:
        logging.getLogger("slam_jax").warning("%s, row %d is skipped: %s", table.path, line, reason)


def _read_digits(wanted: _Wanted) -> Dataset:
    rows = read_digits()
    tokenizer = wanted.tokenizer_of(_texts(rows["train"]))
    return _from_rows(wanted, rows, "digits", tokenizer, streams=["image"])


def _read_mnist(wanted: _Wanted) -> Dataset:
    rows = read_mnist(wanted.config)
    tokenizer = wanted.tokenizer_of(word for texts in MNIST_TEXTS for word in texts)
    return _from_rows(wanted, rows, "mnist", tokenizer, streams=["image"], texts=MNIST_TEXTS)


def _read_coco_captions(wanted: _Wanted) -> Dataset:
    rows = read_captions(wanted.config)
    most, context = wanted.config.max_damaged_records, wanted.model.context_length
    sample = Rows(rows["train"], "coco_captions, train", size=1, streams=(), max_damaged=most)
    tokenizer = wanted.tokenizer_of(sample.corpus())
    # Which captions fit, the tokenizer decides that is trained on all.
    fitting = {
        split: with_fitting_answers(each, tokenizer, context) for split, each in rows.items()
    }
    made = _from_rows(
        wanted,
        fitting,
        "coco_captions",
        tokenizer,
        streams=["image"],
        longest=context - 2,
    )
    return dataclasses.replace(made, corpus_is_whole=not sample.undecoded.damaged)


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield from (row.text or "", row.prompt, *row.answers)


def _from_rows(
    wanted: _Wanted,
    splits: Mapping[str, Sequence[Any]],
    name: str,
    tokenizer: Tokenizer,
    *,
    aux_format: AuxFormat | None = None,
    **settings: Any,
) -> Dataset:
    config, model = wanted.config, wanted.model
    sources = {
        split: Rows(
            rows,
            f"{name}, {split}",
            size=model.image.size,
            augment=config.augment if split == "train" else 0.0,
            drop_inputs=config.drop_inputs if split == "train" else 0.0,
            aux_format=aux_format,
            aux_width=model.aux_dim,
            max_damaged=config.max_damaged_records,
            **settings,
        )
        for split, rows in splits.items()
    }
    train, validation, test = (sources[split] for split in SPLITS)
    return Dataset(train, validation, test, tokenizer, aux_format)


_READERS: dict[str, Callable[..., Dataset]] = {
    "sort_of_clevr": _read_sort_of_clevr,
    "folder": _read_folder,
    "digits": _read_digits,
    "mnist": _read_mnist,
    "coco_captions": _read_coco_captions,
}
