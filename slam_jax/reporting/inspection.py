"""Inspection of a data set: what it holds and what a model is shown of it."""

import contextlib
import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slam_jax.data.config import DataConfig
from slam_jax.data.datasets import Dataset, prepare
from slam_jax.data.folder import BadRow, Table, line_of
from slam_jax.data.images import load_image
from slam_jax.data.pipeline import Example, Source, evaluation_batches
from slam_jax.data.records import DamagedRecord
from slam_jax.data.views import TRAINING_VIEWS
from slam_jax.errors import InputError
from slam_jax.reporting.contact_sheet import Tile
from slam_jax.slam_v3.config import SlamV3Config

_NO_LIMIT = 1 << 20
_MAX_EXAMPLES = 2_000
_MAX_TILES = 30


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Findings about a data set.

    bad: all rows of a folder's table that cannot be used.
    shapes: view -> input -> shape of a batch.
    num_examples: examples of the training split that were counted.
    lengths: of each text, prompt and answer among these, the number of tokens.
    answers: how often each answer occurs among these.
    tiles: pictures for a contact sheet.
    """

    config: DataConfig
    dataset: Dataset
    bad: tuple[BadRow, ...]
    shapes: Mapping[str, Mapping[str, str]]
    num_examples: int
    lengths: Mapping[str, Sequence[int]]
    answers: Mapping[str, int]
    tiles: tuple[Tile, ...]

    @property
    def name(self) -> str:
        table = self.dataset.table
        return self.config.name if table is None else str(table.path)


def inspect_data(config: DataConfig, model: SlamV3Config) -> Inspection:
    """Prepares a data set and looks through up to 2,000 training examples, without augmentation.

    Of a folder every row and picture is checked, and `max_damaged_records` does not apply.

    Raises:
      ConfigError, DataError: the data set cannot be prepared, or no row can be used.
    """
    plain = dataclasses.replace(config, augment=0.0, drop_inputs=0.0)
    if config.name != "folder":
        return _inspect(config, prepare(plain, model=model))
    lenient = dataclasses.replace(plain, max_damaged_records=_NO_LIMIT)
    with _without_warnings():  # the report lists their content
        dataset = prepare(lenient, model=model)
        found, table = _inspect(config, dataset), dataset.table
        assert table is not None
        bad = sorted([*table.bad, *_undecodable(table, model.image.size)])
    return dataclasses.replace(found, bad=tuple(bad))


def _inspect(config: DataConfig, dataset: Dataset) -> Inspection:
    source, tokenizer = dataset.train, dataset.tokenizer
    views = [view for view in source.views if view in TRAINING_VIEWS]
    fullest = "all" if "all" in views else views[0]
    lengths, answers, pictured, num_examples = defaultdict(list), Counter(), [], 0
    for i, example in _examples(source, fullest, _spread(range(len(source)), _MAX_EXAMPLES)):
        num_examples += 1
        answers.update(example.answers)
        texts = () if example.text is None else (example.text,)
        parts = {"text": texts, "prompt": example.prompts, "answer": example.answers}
        for part, texts in parts.items():
            lengths[part] += [len(tokenizer.encode(text)) for text in texts]
        if example.image is not None:
            pictured.append(i)
    shown = _examples(source, fullest, _spread(pictured, _MAX_TILES))
    return Inspection(
        config,
        dataset,
        bad=(),
        shapes={view: _shapes(config, dataset, view) for view in views},
        num_examples=num_examples,
        lengths={part: counts for part, counts in lengths.items() if counts},
        answers=answers,
        tiles=tuple(_tile(i, example) for i, example in shown),
    )


def _examples(source: Source, view: str, indices: Iterable[int]) -> Iterator[tuple[int, Example]]:
    for i in indices:
        with contextlib.suppress(DamagedRecord):
            yield i, source.render(source[i], view, np.random.default_rng((0, i)))


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _tile(i: int, example: Example) -> Tile:
    question = i % len(example.prompts)  # scenes differ in the question that is shown
    assert example.image is not None
    return Tile(example.image, example.prompts[question], example.answers[question])


def _shapes(config: DataConfig, dataset: Dataset, view: str) -> dict[str, str]:
    batches = evaluation_batches(
        dataset.train, dataset.tokenizer, view, config.batch_size, seed=config.seed
    )
    first = next(batches, None)
    if first is None:
        return {}
    shapes = {"tokens": _shape(first.batch.tokens)}
    for name in ("text", "image", "aux"):
        if (value := getattr(first.batch.inputs, name)) is not None:
            masked = getattr(first.batch.inputs, f"{name}_mask") is not None
            shapes[name] = _shape(value) + (", mask" if masked else "")
    return shapes


def _shape(array: Any) -> str:
    return "x".join(map(str, array.shape))


def _undecodable(table: Table, size: int) -> Iterator[BadRow]:
    """The rows whose picture cannot be decoded; each picture is tried once."""
    reasons: dict[Any, str | None] = {None: None}
    for row in (row for rows in table.rows.values() for row in rows):
        if row.image not in reasons:
            try:
                load_image(row.image, size)
                reasons[row.image] = None
            except InputError as error:
                reasons[row.image] = f"image: {error}"
        if (reason := reasons[row.image]) is not None:
            yield BadRow(line_of(row), reason)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("slam_jax")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
