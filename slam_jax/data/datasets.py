"""The data sets that a config can name, built or read on first use."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slam_jax.data.built import build_once, open_splits
from slam_jax.data.config import DataConfig
from slam_jax.data.folder import SPLITS, Table, read_table
from slam_jax.data.hub_tokenizer import AnyTokenizer, load_tokenizer
from slam_jax.data.images import RESIZE_POLICIES
from slam_jax.data.numbers import AuxFormat
from slam_jax.data.parts import Dataset, Part, check_numbers, fit_table, join, with_columns
from slam_jax.data.public import (
    digit_texts,
    read_captions,
    read_digits,
    read_mnist,
    with_fitting_answers,
)
from slam_jax.data.records import Records
from slam_jax.data.rows import (
    CORPUS_ROWS,
    Lengths,
    Row,
    Texts,
    measure,
    texts_of,
)
from slam_jax.data.scenes import Scenes
from slam_jax.data.sort_of_clevr import COLOURS, SHAPES, SIZE, SortOfClevr
from slam_jax.data.tfds_sets import read_tfds
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.data.views import VIEWS
from slam_jax.errors import ConfigError, check_names, require
from slam_jax.slam_v3.config import SlamV3Config

_PICTURES = ("image",)
_VARIANTS = (SortOfClevr.name, "digits", "tfds")
OWN = "own"
"""`data.name` of a run on a data set that was given in Python."""


def prepare(
    config: DataConfig,
    tokenizer: AnyTokenizer | None = None,
    *,
    aux_format: AuxFormat | None = None,
    model: SlamV3Config | None = None,
) -> Dataset:
    """The data set `config.name`, built in `config.directory` if it is not there yet.

    Args:
      config: `sort_of_clevr`, or `sort_of_clevr/tiny` for trying out; `folder` with `config.path`
        or `config.mixture`, for data of one's own; `digits`, or `digits/words` with words as
        answers; `mnist`, `coco_captions` and any other set as `tfds/NAME`, which TFDS downloads,
        and builds with TensorFlow.
      tokenizer, aux_format: those of a checkpoint; None makes them from the training split.
      model: what will read it: the size of images, the width of auxiliary vectors, the context.

    Raises:
      ConfigError: if there is no data set of that name, or it cannot show what a stage asks for.
      DataError: if it can neither be read nor built.
    """
    name, _, variant = config.name.partition("/")
    if name == OWN:
        raise ConfigError(
            "data.name is 'own': the run had a data set that was given in Python; give it again as "
            "dataset= of slam_jax.train or evaluate_checkpoint, or use one of "
            f"{', '.join(_READERS)}"
        )
    reader = _READERS.get(name)
    if reader is None or (variant and name not in _VARIANTS):
        raise ConfigError(f"data.name is {config.name!r}; use one of {', '.join(_READERS)}")
    if name != SortOfClevr.name:
        only = f"only {SortOfClevr.name} has several questions an example"
        require(config.questions is None, "data.questions", config.questions, f"None; {only}")
        for field in ("descriptions", "closest_objects"):
            value = getattr(config, field)
            require(not value, f"data.{field}", value, f"0; {only}")
    dataset = reader(config, model or SlamV3Config(vocab_size=1), tokenizer, aux_format)
    check_names(config.views, dataset.train.views, f"data.stages: {config.name}", "view")
    if config.resize != RESIZE_POLICIES[0] and model and model.image.preprocessing is not None:
        note = f"data.resize={config.resize} is not used; the vision tower prepares pictures itself"
        dataset = dataclasses.replace(dataset, notes=(*dataset.notes, note))
    for note in dataset.notes:
        place = config.name if dataset.table is None else dataset.table.path
        logging.getLogger("slam_jax").warning("%s: %s", place, note)
    return dataset


def _read_sort_of_clevr(
    config: DataConfig, model: SlamV3Config, tokenizer: AnyTokenizer | None, _: Any
) -> Dataset:
    for field in ("augment", "flip", "colour", "drop_inputs"):
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
    if config.mixture:
        require(config.path is None, "data.path", config.path, "None beside data.mixture")
        return _read_mixture(config, model, tokenizer, aux_format)
    if config.path is None:
        raise ConfigError("data.path is not given; give it the folder with your table")
    names = aux_format.names if aux_format is not None and aux_format.has_columns else ()
    # Without a tokenizer there is no checkpoint, and the table says which columns there are.
    table = _open_table(config.path, config, model, None if tokenizer is None else names, tokenizer)
    tokenizer = tokenizer or _tokenizer_of(_flat(texts_of(table.rows["train"])), config, model)
    parts = [fit_table(table, config, model, tokenizer)]
    check_numbers(table.columns, str(table.path), model)
    return join(parts, config, model, tokenizer, aux_format)


def _open_table(
    path: str,
    config: DataConfig,
    model: SlamV3Config,
    columns: Sequence[str] | None,
    tokenizer: AnyTokenizer | None,
) -> Table:
    return read_table(
        path,
        version=config.table_version,
        columns=columns,
        context_length=model.context_length,
        names=config.columns,
        # A checkpoint can be evaluated on rows for test alone.
        required=SPLITS if tokenizer is None else ("test",),
        cache=config.directory / "tar_indices",
    )


def _read_mixture(
    config: DataConfig,
    model: SlamV3Config,
    tokenizer: AnyTokenizer | None,
    aux_format: AuxFormat | None,
) -> Dataset:
    opened = [_open_part(place, config, model, tokenizer) for place, _ in config.mixture]
    if tokenizer is None:
        corpus = itertools.chain.from_iterable(each.corpus for each in opened)
        tokenizer = _tokenizer_of(_flat(corpus), config, model)
    parts = [each.fit(tokenizer) for each in opened]
    columns = tuple(dict.fromkeys(name for part in parts for name in part.columns))
    if aux_format is not None:
        check_names(columns, list(aux_format.names), "the checkpoint", "number column")
        columns = aux_format.names
    check_numbers(columns, "data.mixture", model)
    parts = [with_columns(part, columns) for part in parts]
    return join(parts, config, model, tokenizer, aux_format)


class _Opened(NamedTuple):
    """A part of a mixture before the tokenizer is known. corpus: what a tokenizer learns."""

    corpus: Iterable[Texts]
    fit: Callable[[AnyTokenizer], Part]


def _open_part(
    place: str, config: DataConfig, model: SlamV3Config, tokenizer: AnyTokenizer | None
) -> _Opened:
    if place.partition("/")[0] in _ROW_SETS:
        return _open_rows(dataclasses.replace(config, name=place, mixture=()), model)
    if place.partition("/")[0] == SortOfClevr.name:
        raise ConfigError(f"data.mixture has {place!r}, which has scenes and no rows; leave it out")
    table = _open_table(place, config, model, None, tokenizer)
    fit = functools.partial(fit_table, table, config, model)
    return _Opened(texts_of(table.rows["train"]), fit)


def _read_rows(
    config: DataConfig, model: SlamV3Config, tokenizer: AnyTokenizer | None, _: Any
) -> Dataset:
    opened = _open_rows(config, model)
    tokenizer = tokenizer or _tokenizer_of(_flat(opened.corpus), config, model)
    dataset = join([opened.fit(tokenizer)], config, model, tokenizer, None)
    whole = not getattr(opened.corpus, "damaged", None)
    return dataclasses.replace(dataset, corpus_is_whole=whole)


def _open_rows(config: DataConfig, model: SlamV3Config) -> _Opened:
    """A data set of rows that is no folder."""
    name, _, variant = config.name.partition("/")
    if name == "coco_captions":
        return _open_captions(config, model)
    if name == "tfds":
        return _open_tfds(config, model)
    if variant not in ("", "words"):
        raise ConfigError(f"data.name is {config.name!r}; use one of digits, digits/words")
    texts = digit_texts(words=variant == "words")
    rows = read_mnist(config) if name == "mnist" else read_digits(words=variant == "words")

    def fit(tokenizer: AnyTokenizer) -> Part:
        return Part(config.name, rows, _PICTURES, lengths=measure(texts, tokenizer))

    return _Opened(texts, fit)


class _Sample:
    """The texts of the first training rows. damaged: those of them that could not be read."""

    def __init__(self, rows: Records):
        self._rows = rows

    def __iter__(self) -> Iterator[Texts]:
        return texts_of(self._rows, CORPUS_ROWS)

    @property
    def damaged(self) -> set[int]:
        return self._rows.damaged


def _open_captions(config: DataConfig, model: SlamV3Config) -> _Opened:
    rows = read_captions(config)
    sample = Records(rows["train"], "coco_captions, train", config.max_damaged_records)
    return _Opened(
        _Sample(sample), functools.partial(_fit_rows, config.name, rows, _PICTURES, model)
    )


def _fit_rows(
    name: str,
    rows: Mapping[str, Sequence[Any]],
    streams: Sequence[str],
    model: SlamV3Config,
    tokenizer: AnyTokenizer,
    lacking: Sequence[str] = (),
) -> Part:
    """Rows that are read one by one, without the answers that do not fit into the context."""
    context = model.context_length
    fitting = {s: with_fitting_answers(each, tokenizer, context) for s, each in rows.items()}
    text = (0, context) if "text" in streams else (0, 0)
    lengths = Lengths(text, context - 2, context - 2)
    return Part(name, fitting, streams, lacking, lengths=lengths)


def _open_tfds(config: DataConfig, model: SlamV3Config) -> _Opened:
    found = read_tfds(config)
    sample = Records(found.rows["train"], f"{config.name}, train", config.max_damaged_records)
    fit = functools.partial(
        _fit_rows, config.name, found.rows, found.streams, model, lacking=found.lacking
    )
    return _Opened(_Sample(sample), fit)


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


def dataset_from_rows(
    rows: Mapping[str, Sequence[Row]],
    config: DataConfig,
    *,
    model: SlamV3Config,
    tokenizer: AnyTokenizer | None = None,
) -> Dataset:
    """A data set of own rows, for `slam_jax.train(..., dataset=)`.

    Args:
      rows: lists of `Row` for "train", "validation" and "test". Numbers are vectors without names.
      model: what will read it, such as `Experiment.from_config(config).model`.
      tokenizer: None trains one on the training rows.

    Raises:
      ConfigError: a split is missing, a row has numbers, or the views of `config` cannot be shown.
      DataError: a row does not fit into the context.
    """
    check_names(rows, SPLITS, "rows", "split")
    lists = {split: list(rows.get(split, ())) for split in SPLITS}
    for split, each in lists.items():
        require(bool(each), f"rows[{split!r}]", [], "at least one row")
    has_numbers = any(row.numbers is not None for each in lists.values() for row in each)
    require(not has_numbers, "Row.numbers", "given", "None: numbers need a table with their names")
    lists = {
        split: [
            row._replace(where=row.where or f"{split}, row {i}") for i, row in enumerate(each, 1)
        ]
        for split, each in lists.items()
    }
    tokenizer = tokenizer or _tokenizer_of(_flat(texts_of(lists["train"])), config, model)
    table = Table(Path("own rows"), lists, (), (), ())
    part = fit_table(table, config, model, tokenizer)._replace(table=None)
    dataset = join([part], dataclasses.replace(config, mixture=()), model, tokenizer, None)
    check_names(config.views, dataset.train.views, "data.stages: these rows", "view")
    return dataset


_READERS: dict[str, Callable[..., Dataset]] = {
    SortOfClevr.name: _read_sort_of_clevr,
    "folder": _read_folder,
    "digits": _read_rows,
    "mnist": _read_rows,
    "coco_captions": _read_rows,
    "tfds": _read_rows,
}
_ROW_SETS = ("digits", "mnist", "coco_captions", "tfds")
