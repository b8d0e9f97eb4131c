"""What a data set holds, and what of it a model will see."""

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

_MOST_DAMAGED = 1 << 20
_SAMPLED = 2_000
_TILES = 30


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    table: of a folder. bad: its rows that cannot be used, for whatever reason.
    shapes: of a batch by view and input. sampled: examples in which was counted how many tokens
    each text, prompt and answer has (`lengths`), and how often each answer occurs (`answers`).
    tiles: pictures for a contact sheet.
    """

    config: DataConfig
    dataset: Dataset
    table: Table | None
    bad: tuple[BadRow, ...]
    shapes: Mapping[str, Mapping[str, str]]
    sampled: int
    lengths: Mapping[str, Sequence[int]]
    answers: Mapping[str, int]
    tiles: tuple[Tile, ...]

    @property
    def name(self) -> str:
        return self.config.name if self.table is None else str(self.table.path)


def inspect_data(config: DataConfig, model: SlamV3Config) -> Inspection:
    """Prepares a data set and looks through it: at 2,000 training examples, spread over the split,
    and at every row and picture of a folder, whatever `max_damaged_records` says. Examples are
    shown as they are: nothing is cropped or left out.

    Raises:
      ConfigError, DataError: it cannot be prepared, or no row can be used.
    """
    whole = dataclasses.replace(config, augment=0.0, drop_inputs=0.0)
    if config.name != "folder" or config.path is None:
        return _inspect(config, prepare(whole, model=model))
    lenient = dataclasses.replace(whole, max_damaged_records=_MOST_DAMAGED)
    with _without_warnings():  # the report lists what they would tell
        found = _inspect(config, prepare(lenient, model=model))
        table = found.dataset.table
        assert table is not None
        bad = sorted([*table.bad, *_unreadable(table, model.image.size)])
    return dataclasses.replace(found, table=table, bad=tuple(bad))


def _inspect(config: DataConfig, dataset: Dataset) -> Inspection:
    source, tokenizer = dataset.train, dataset.tokenizer
    views = [view for view in source.views if view in TRAINING_VIEWS]
    fullest = "all" if "all" in views else views[0]
    lengths, answers, pictured, sampled = defaultdict(list), Counter(), [], 0
    for i, example in _examples(source, fullest, _spread(range(len(source)), _SAMPLED)):
        sampled += 1
        answers.update(example.answers)
        texts = () if example.text is None else (example.text,)
        parts = {"text": texts, "prompt": example.prompts, "answer": example.answers}
        for part, given in parts.items():
            lengths[part] += [len(tokenizer.encode(text)) for text in given]
        if example.image is not None:
            pictured.append(i)
    return Inspection(
        config,
        dataset,
        table=None,
        bad=(),
        shapes={view: _shapes(config, dataset, view) for view in views},
        sampled=sampled,
        lengths={part: counts for part, counts in lengths.items() if counts},
        answers=answers,
        tiles=tuple(
            _tile(i, example)
            for i, example in _examples(source, fullest, _spread(pictured, _TILES))
        ),
    )


def _examples(source: Source, view: str, indices: Iterable[int]) -> Iterator[tuple[int, Example]]:
    for i in indices:
        with contextlib.suppress(DamagedRecord):
            yield i, source.render(source[i], view, np.random.default_rng((0, i)))


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def _tile(i: int, example: Example) -> Tile:
    asked = i % len(example.prompts)  # another question for each scene
    assert example.image is not None
    return Tile(example.image, example.prompts[asked], example.answers[asked])


def _shapes(config: DataConfig, dataset: Dataset, view: str) -> dict[str, str]:
    batches = evaluation_batches(
        dataset.train, dataset.tokenizer, view, config.batch_size, seed=config.seed
    )
    first = next(batches, None)
    if first is None:
        return {}
    inputs = first.batch.inputs
    shapes = {"tokens": _shape(first.batch.tokens)}
    for name in ("text", "image", "aux"):
        if (value := getattr(inputs, name)) is not None:
            masked = getattr(inputs, f"{name}_mask") is not None
            shapes[name] = _shape(value) + (", mask" if masked else "")
    return shapes


def _shape(array: Any) -> str:
    return "x".join(map(str, array.shape))


def _unreadable(table: Table, size: int) -> Iterator[BadRow]:
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
