"""Inspection of a data set: its content and the inputs that a model gets of it."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slam_jax.data.config import DataConfig
from slam_jax.data.datasets import Dataset, prepare
from slam_jax.data.describe import describe
from slam_jax.data.folder import BadRow, Table, line_of
from slam_jax.data.formats import open_picture
from slam_jax.data.images import as_pictures, load_image
from slam_jax.data.pipeline import Example, Source, evaluation_batches
from slam_jax.data.records import DamagedRecord
from slam_jax.data.views import TRAINING_VIEWS
from slam_jax.errors import InputError, shorten
from slam_jax.evaluation.table import make_console, print_table
from slam_jax.reporting.contact_sheet import Tile
from slam_jax.reporting.rendering import side_by_side
from slam_jax.slam_v3.config import ImageConfig, SlamV3Config

_NO_LIMIT = 1 << 20
_MAX_EXAMPLES = 2_000
_MAX_TILES = 30
_MAX_ANSWERS = 10
_INPUTS = ("text", "image", "aux", "tokens")


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
    plain = config.plain
    if config.name != "folder":
        return _inspect(config, prepare(plain, model=model))
    lenient = dataclasses.replace(plain, max_damaged_records=_NO_LIMIT)
    logger = logging.getLogger("slam_jax")
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)  # `bad` has what the warnings say
        dataset = prepare(lenient, model=model)
        found, bad = _inspect(config, dataset), []
        for table in dataset.tables:
            bad += sorted([*table.bad, *_undecodable(table, model.image, config.resize)])
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
    tiles = []
    for i, example in _examples(source, fullest, _spread(pictured, _MAX_TILES)):
        question = i % len(example.prompts)  # scenes differ in the question that is shown
        shown = side_by_side(example.pictures)
        tiles.append(Tile(shown, example.prompts[question], example.answers[question]))
    return Inspection(
        config,
        dataset,
        bad=(),
        shapes={view: _shapes(config, dataset, view) for view in views},
        num_examples=num_examples,
        lengths={part: counts for part, counts in lengths.items() if counts},
        answers=answers,
        tiles=tuple(tiles),
    )


def _examples(source: Source, view: str, indices: Iterable[int]) -> Iterator[tuple[int, Example]]:
    for i in indices:
        with contextlib.suppress(DamagedRecord):
            yield i, source.render(source[i], view, np.random.default_rng((0, i)))


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _shapes(config: DataConfig, dataset: Dataset, view: str) -> dict[str, str]:
    size, seed = config.batch_size, config.seed
    first = next(evaluation_batches(dataset.train, dataset.tokenizer, view, size, seed=seed), None)
    if first is None:
        return {}
    arrays: dict[str, Any] = {"tokens": first.batch.tokens, **vars(first.batch.inputs)}
    return {
        name: "x".join(map(str, arrays[name].shape))
        + ", mask" * (arrays.get(f"{name}_mask") is not None)
        for name in _INPUTS
        if arrays[name] is not None
    }


def _undecodable(table: Table, config: ImageConfig, resize: str) -> Iterator[BadRow]:
    """The rows with a picture that cannot be decoded; each picture is tried once."""

    @functools.cache
    def reason(image: Any) -> str | None:
        try:
            load_image(open_picture(image), config.size, config.preprocessing or resize)
        except InputError as error:
            return f"image: {error}"
        return None

    for row in itertools.chain.from_iterable(table.rows.values()):
        if found := next(filter(None, map(reason, as_pictures(row.image))), None):
            yield BadRow(line_of(row), found)


def print_inspection(found: Inspection, file: Any = None) -> None:
    """Prints the findings as tables to `file`, standard output by default."""
    console = make_console(file)
    for title, columns, rows in _tables(found):
        print_table(console, title, columns, rows)
        console.print()
    aux, lines = found.dataset.aux_format, list(found.dataset.notes)
    if aux is not None and not aux.has_columns:
        lines.insert(0, f"numbers of an auxiliary vector: {', '.join(aux.names)}\n")
    if found.dataset.tables:
        lines = [*describe(found.dataset, found.config), *lines]
        limit = found.config.max_damaged_records
        refused = "; training refuses more" if len(found.bad) > limit else ""
        lines.append(
            f"rows that cannot be used: {len(found.bad):,} "
            f"(data.max_damaged_records={limit:,}{refused})"
        )
        lines += [f"  row {row}: {reason}" for row, reason in found.bad]
    for line in lines:
        console.print(line, soft_wrap=True)


def _tables(found: Inspection) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """The title, the columns and the rows of each table."""
    splits = ("train", "validation", "test")
    rows = [(split, f"{len(getattr(found.dataset, split)):,}") for split in splits]
    yield found.name, ("split", "records"), rows

    rows = []
    for view, shapes in found.shapes.items():
        starts = [f"{stage.first:,}" for stage in found.config.stages if stage.rates.get(view)]
        rows.append((view, *(starts or "-")[:1], *(shapes.get(name, "-") for name in _INPUTS)))
    title = f"views, and the shapes of a batch of {found.config.batch_size:,}"
    yield title, ("view", "used from step", *_INPUTS), rows

    figures = (min, statistics.median_low, max)
    rows = [
        (part, *(f"{figure(counts):,}" for figure in figures))
        for part, counts in found.lengths.items()
    ]
    known = found.dataset.tokenizer.vocab_size
    title = f"tokens, of {known:,} in the vocabulary, in {found.num_examples:,} training examples"
    yield title, ("of a", "min", "median", "max"), rows

    total = sum(found.answers.values())
    common = Counter(found.answers).most_common(_MAX_ANSWERS)
    shown = [(shorten(" ".join(answer.split()), 45), count) for answer, count in common]
    if others := len(found.answers) - len(common):
        shown.append((f"({others:,} others)", total - sum(count for _, count in common)))
    rows = [(answer, f"{count:,}", f"{100 * count / total:.1f}%") for answer, count in shown]
    yield "their answers", ("answer", "times", "share"), rows

    aux = found.dataset.aux_format
    if aux is not None and aux.mean is not None and aux.scale is not None:
        columns = zip(aux.names, aux.mean, aux.scale, strict=False)  # empty without training rows
        rows = [(name, f"{mean:.6g}", f"{scale:.6g}") for name, mean, scale in columns]
        yield "columns of numbers", ("column", "mean", "scale"), rows
