"""The data sets that a config can name, built or read on first use."""

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slam_jax.data.built import build_once, open_splits
from slam_jax.data.config import DataConfig
from slam_jax.data.folder import SPLITS, Table, line_of, read_table, without_long_rows
from slam_jax.data.hub_tokenizer import AnyTokenizer, load_tokenizer
from slam_jax.data.notes import outlier_notes
from slam_jax.data.numbers import AuxFormat
from slam_jax.data.pipeline import Source
from slam_jax.data.public import (
    digit_texts,
    read_captions,
    read_digits,
    read_mnist,
    with_fitting_answers,
)
from slam_jax.data.records import DataError, Records
from slam_jax.data.rows import CORPUS_ROWS, Lengths, Rows, Texts, measure, texts_of
from slam_jax.data.scenes import Scenes
from slam_jax.data.sort_of_clevr import COLOURS, SHAPES, SIZE, SortOfClevr
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.data.views import VIEWS
from slam_jax.errors import ConfigError, check_names, require
from slam_jax.slam_v3.config import SlamV3Config

_PICTURES = ("image",)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits, the tokenizer of their text and the format of their auxiliary vectors.

    corpus_is_whole: whether none of the records that a tokenizer is trained on is damaged, so that
    the same data give the same tokenizer. table: the table of a folder. notes: what the user should
    know about the data, one line each.
    """

    train: Source
    validation: Source
    test: Source
    tokenizer: AnyTokenizer
    aux_format: AuxFormat | None = None
    corpus_is_whole: bool = True
    table: Table | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the data: the number of rows by split, and the sha256 of a table."""
        found: dict[str, Any] = {"rows": {name: len(getattr(self, name)) for name in SPLITS}}
        if self.table is not None:
            with self.table.path.open("rb") as file:
                found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def prepare(
    config: DataConfig,
    tokenizer: AnyTokenizer | None = None,
    *,
    aux_format: AuxFormat | None = None,
    model: SlamV3Config | None = None,
) -> Dataset:
    """The data set `config.name`, built in `config.directory` if it is not there yet.

    Args:
      config: `sort_of_clevr`, or `sort_of_clevr/tiny` for trying out; `folder` with `config.path`,
        for data of one's own; `digits`, or `digits/words` with words as answers; `mnist` and
        `coco_captions`, which TFDS downloads, and builds with TensorFlow.
      tokenizer, aux_format: those of a checkpoint; None makes them from the training split.
      model: what will read it: the size of images, the width of auxiliary vectors, the context.

    Raises:
      ConfigError: if there is no data set of that name, or it cannot show what a stage asks for.
      DataError: if it can neither be read nor built.
    """
    name, _, variant = config.name.partition("/")
    reader = _READERS.get(name)
    if reader is None or (variant and name not in (SortOfClevr.name, "digits")):
        raise ConfigError(f"data.name is {config.name!r}; use one of {', '.join(_READERS)}")
    if name != SortOfClevr.name:
        only = f"only {SortOfClevr.name} has several questions an example"
        require(config.questions is None, "data.questions", config.questions, f"None; {only}")
        for field in ("descriptions", "closest_objects"):
            value = getattr(config, field)
            require(not value, f"data.{field}", value, f"0; {only}")
    dataset = reader(config, model or SlamV3Config(vocab_size=1), tokenizer, aux_format)
    check_names(config.views, dataset.train.views, f"data.stages: {config.name}", "view")
    for note in dataset.notes:
        place = config.name if dataset.table is None else dataset.table.path
        logging.getLogger("slam_jax").warning("%s: %s", place, note)
    return dataset


def _read_sort_of_clevr(
    config: DataConfig, model: SlamV3Config, tokenizer: AnyTokenizer | None, _: Any
) -> Dataset:
    for field in ("augment", "drop_inputs"):
        value = getattr(config, field)
        require(not value, f"data.{field}", value, f"0 for {SortOfClevr.name}")
    variants = {known.name: known for known in SortOfClevr.BUILDER_CONFIGS}
    chosen = variants.get(config.name.partition("/")[2] or "full")
    if chosen is None:
        known = ", ".join(f"sort_of_clevr/{v}" for v in variants)
        raise ConfigError(f"data.name is {config.name!r}; use sort_of_clevr or one of {known}")
    size = model.image.size
    fits = size == SIZE or not any("image" in VIEWS[view].streams for view in config.views)
    require(fits, "model.image.size", size, f"{SIZE}, the size of the pictures of {config.name}")
    make_builder = functools.partial(SortOfClevr, config=chosen.name)
    build_once(config, make_builder, chosen.train + chosen.validation + chosen.test)
    name, most = f"{SortOfClevr.name}/{chosen.name}", config.max_damaged_records
    opened = zip(SPLITS, open_splits(config, name, SPLITS), strict=True)
    records = [Records(each, f"{name}, {split}", most) for split, each in opened]
    train = Scenes(
        records[0],
        questions=config.questions,
        descriptions=config.descriptions,
        closest_objects=config.closest_objects,
    )
    validation, test = map(Scenes, records[1:])
    tokenizer = tokenizer or _tokenizer_of(train.corpus(), config, model)
    aux_format = AuxFormat((*COLOURS, *SHAPES, "x", "y"))
    whole = not records[0].damaged
    return Dataset(train, validation, test, tokenizer, aux_format, corpus_is_whole=whole)


def _read_folder(
    config: DataConfig,
    model: SlamV3Config,
    tokenizer: AnyTokenizer | None,
    aux_format: AuxFormat | None,
) -> Dataset:
    if config.path is None:
        raise ConfigError("data.path is not given; give it the folder with your table")
    names = aux_format.names if aux_format is not None and aux_format.has_columns else ()
    table = read_table(
        config.path,
        version=config.table_version,
        # Without a tokenizer there is no checkpoint, and the table says which columns there are.
        columns=None if tokenizer is None else names,
        context_length=model.context_length,
    )
    tokenizer = tokenizer or _tokenizer_of(_flat(texts_of(table.rows["train"])), config, model)
    table = without_long_rows(table, tokenizer, model.context_length)
    _check_table(table, config, model)
    all_rows = [row for rows in table.rows.values() for row in rows]
    lacks = {
        "image": [row.image is None for row in all_rows],
        "text": [row.text is None for row in all_rows],
        "aux": [row.numbers is None or np.isnan(row.numbers).any() for row in all_rows],
    }
    streams = [name for name, missing in lacks.items() if not all(missing)]
    notes = table.notes
    if aux_format is None and table.columns:
        streams = list(dict.fromkeys((*streams, "aux")))
        robust, rows = config.table_version is not None, table.rows["train"]
        numbers = np.array([row.numbers for row in rows])
        aux_format = AuxFormat.of_columns(table.columns, numbers, robust=robust)
        notes += tuple(outlier_notes(table.columns, numbers, list(map(line_of, rows)), robust))
    dataset = _from_rows(
        table.rows,
        str(table.path),
        config,
        model,
        tokenizer,
        streams,
        aux_format,
        lacking=[name for name in streams if any(lacks[name])],
    )
    return dataclasses.replace(dataset, table=table, notes=notes)


def _check_table(table: Table, config: DataConfig, model: SlamV3Config) -> None:
    """Raises an error if too few rows can be used, or the model cannot read the number columns."""
    path, bad = table.path, table.bad
    if len(bad) > config.max_damaged_records:
        line, reason = bad[0]
        more = f" (and {len(bad) - 1} more such)" if len(bad) > 1 else ""
        raise DataError(
            f"{path}, row {line}: {reason}{more}; repair it, or let "
            f"data.max_damaged_records={len(bad)} rows be skipped"
        )
    for line, reason in bad:
        logging.getLogger("slam_jax").warning("%s, row %d is skipped: %s", path, line, reason)
    for split, rows in table.rows.items():
        if not rows:
            raise DataError(f"{path}: no row is left for {split}; repair the bad ones")
    slots = (
        f"True, as {path} has columns of numbers ({', '.join(table.columns)}) and each is a slot"
    )
    require(model.aux_slots or not table.columns, "model.aux_slots", model.aux_slots, slots)
    count = len(table.columns)
    most = f"at least {count}, as {path} has {count} columns of numbers"
    require(count <= model.max_aux, "model.max_aux", model.max_aux, most)


def _read_digits(
    config: DataConfig, model: SlamV3Config, tokenizer: AnyTokenizer | None, _: Any
) -> Dataset:
    variant = config.name.partition("/")[2]
    if variant not in ("", "words"):
        raise ConfigError(f"data.name is {config.name!r}; use one of digits, digits/words")
    texts = digit_texts(words=variant == "words")
    rows = read_mnist(config) if config.name == "mnist" else read_digits(words=variant == "words")
    tokenizer = tokenizer or _tokenizer_of(_flat(texts), config, model)
    lengths = measure(texts, tokenizer)
    return _from_rows(rows, config.name, config, model, tokenizer, _PICTURES, lengths=lengths)


def _read_coco_captions(
    config: DataConfig, model: SlamV3Config, tokenizer: AnyTokenizer | None, _: Any
) -> Dataset:
    rows, context = read_captions(config), model.context_length
    sample = Records(rows["train"], "coco_captions, train", config.max_damaged_records)
    tokenizer = tokenizer or _tokenizer_of(_flat(texts_of(sample, CORPUS_ROWS)), config, model)
    # The tokenizer, which is trained on all captions, decides which ones fit.
    fitting = {
        split: with_fitting_answers(each, tokenizer, context) for split, each in rows.items()
    }
    lengths = Lengths((0, 0), context - 2, context - 2)
    dataset = _from_rows(fitting, config.name, config, model, tokenizer, _PICTURES, lengths=lengths)
    return dataclasses.replace(dataset, corpus_is_whole=not sample.damaged)


def _flat(texts: Iterable[Texts]) -> Iterable[str]:
    return itertools.chain.from_iterable(texts)


def _tokenizer_of(texts: Iterable[str], config: DataConfig, model: SlamV3Config) -> AnyTokenizer:
    """That of the language model that the decoder is; else one that is trained on the texts."""
    if model.decoder.pretrained is None:
        return Tokenizer.train(texts, config.vocab_size)
    tokenizer = load_tokenizer(model.decoder.pretrained)
    if tokenizer.eos_id is None:
        problem = "its tokenizer has no end token, which answers have to end with"
        raise ConfigError(f"model.decoder.pretrained is {model.decoder.pretrained}; {problem}")
    return tokenizer


def _from_rows(
    splits: Mapping[str, Sequence[Any]],
    name: str,
    config: DataConfig,
    model: SlamV3Config,
    tokenizer: AnyTokenizer,
    streams: Sequence[str],
    aux_format: AuxFormat | None = None,
    **known: Any,
) -> Dataset:
    """The data set of these rows by split. streams and known: arguments of `Rows`."""
    plain = dataclasses.replace(config, augment=0.0, drop_inputs=0.0)
    train, validation, test = (
        Rows(
            splits[split],
            f"{name}, {split}",
            config if split == "train" else plain,
            model,
            streams=streams,
            aux_format=aux_format,
            **known,
        )
        for split in SPLITS
    )
    return Dataset(train, validation, test, tokenizer, aux_format)


_READERS: dict[str, Callable[..., Dataset]] = {
    SortOfClevr.name: _read_sort_of_clevr,
    "folder": _read_folder,
    "digits": _read_digits,
    "mnist": _read_digits,
    "coco_captions": _read_coco_captions,
}
