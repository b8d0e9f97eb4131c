"""Batches from any source of examples; each is a pure function of (seed, global step)."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8

from slam_jax.batch import Batch
from slam_jax.data.config import DataConfig
from slam_jax.data.records import DamagedRecord, DataError
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import InputError
from slam_jax.slam_v3.streams import Inputs

_THREADS = 2
_PREFETCHED_BATCHES = 4
_QUESTIONS_KEPT = 1 << 14


class Example(NamedTuple):
    """An example as one view shows it. All examples of a view have the same number Q of prompts.

    text, image, aux: None where the view does not show it or the record lacks it. Rows of `aux`
      that the record lacks are NaN.
    needs_both: for each prompt, whether the answer needs both inputs of a split scene.
    numbers: the numbers that `aux` encodes, NaN = missing. None where the data set has no number
      columns or the view does not show them.
    """

    text: str | None
    image: UInt8[np.ndarray, "H W 3"] | None
    aux: Float[np.ndarray, "A C"] | None
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    kinds: tuple[str, ...]
    needs_both: tuple[bool, ...]
    numbers: tuple[float, ...] | None = None

    @property
    def shows_something(self) -> bool:
        """Whether at least one input is present."""
        known = self.aux is not None and not np.isnan(self.aux).all()
        return known or self.text is not None or self.image is not None


@runtime_checkable
class Source(Protocol):
    """Records by index, how each view shows them, and bounds of their lengths in tokens.

    Indexing raises DamagedRecord for a record that cannot be read; batches skip it.

    views: the views that can be rendered. image_size: height and width of the images.
    render: the record as `view` shows it. All random choices come from `rng`.
    streams: the inputs of a batch of `view`, some of "text", "image" and "aux".
    complete: whether every record has all inputs of `view`; otherwise batches have masks.
    paired: whether text and image of `view` show the same content, as retrieval needs it.
    text_lengths: the smallest and the largest number of tokens of a text in `view`.
    question_length: the largest number of tokens of a prompt and its answer together.
    answer_length: the largest number of tokens of an answer.
    answers: the expected answers of a bounded sample of records. No picture is read for it.
    """

    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def render(self, record: Any, view: str, rng: np.random.Generator) -> Example: ...
    def streams(self, view: str) -> tuple[str, ...]: ...
    def complete(self, view: str) -> bool: ...
    def paired(self, view: str) -> bool: ...
    def text_lengths(self, view: str, tokenizer: Tokenizer) -> tuple[int, int]: ...
    def question_length(self, tokenizer: Tokenizer) -> int: ...
    def answer_length(self, tokenizer: Tokenizer) -> int: ...
    def answers(self) -> Iterator[str]: ...


class EvaluationBatch(NamedTuple):
    """A batch and its examples. The first `valid` rows count; the others repeat the last example,
    so that all batches have the same shape. `examples` holds the valid ones."""

    batch: Batch
    examples: list[Example]
    valid: int


def training_batches(
    source: Source,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[str, Batch]]:
    """Endless (view, batch) from step `start_step` on, as numpy arrays, prefetched.

    Step s gives the same batch whatever the start and the number of processes. Examples are
    reshuffled every epoch. A damaged record is replaced by the next one that can be read.

    rows: the rows of each global batch that this process needs; None = all.
    """
    rows = range(config.batch_size) if rows is None else rows
    indices = grain.MapDataset.source(range(len(source))).seed(config.seed).shuffle().repeat()

    def examples_of(view: str) -> grain.MapDataset:
        def render(index: int, rng: np.random.Generator) -> Example:
            return source.render(_read_from(source, index), view, rng)

        return indices.random_map(render)

    examples: dict[str, Any] = {view: examples_of(view) for view in config.views}
    collate = {view: _Collate(source, tokenizer, view) for view in config.views}

    def batch_of(step: int) -> tuple[str, Batch]:
        view = config.view(step)
        chosen = [examples[view][step * config.batch_size + row] for row in rows]
        return view, collate[view](chosen)

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch_of)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
    return iter(steps.to_iter_dataset(options))


def evaluation_batches(
    source: Source, tokenizer: Tokenizer, view: str, batch_size: int, *, seed: int
) -> Iterator[EvaluationBatch]:
    """Every example of `source` once, in order.

    Records that are damaged or lack all inputs of the view are skipped. Example i depends on
    (seed, i) and the view alone. All views of a scene make the same random choices, so the two
    halves of a split view complete each other.
    """
    collate = _Collate(source, tokenizer, view)

    def examples() -> Iterator[Example]:
        for i in range(len(source)):
            with contextlib.suppress(DamagedRecord):
                example = source.render(source[i], view, np.random.default_rng((seed, i)))
                if example.shows_something:
                    yield example

    remaining = examples()
    while chosen := list(itertools.islice(remaining, batch_size)):
        padding = chosen[-1:] * (batch_size - len(chosen))
        yield EvaluationBatch(collate(chosen + padding), chosen, len(chosen))


def _read_from(source: Source, index: int) -> Any:
    """The record of this index, or the next one that can be read."""
    for i in range(len(source)):
        with contextlib.suppress(DamagedRecord):
            return source[(index + i) % len(source)]
    raise DataError(f"all {len(source)} records are damaged; build the data set again")


class _Collate:
    """Makes a `Batch` of examples of one view; its shapes depend on their number alone."""

    def __init__(self, source: Source, tokenizer: Tokenizer, view: str):
        self._tokenizer = tokenizer
        self._shortest, self._longest = source.text_lengths(view, tokenizer)
        self._streams, self._image_size = source.streams(view), source.image_size
        self._complete = source.complete(view)
        self._paired = source.paired(view)
        self._question_length = source.question_length(tokenizer) + 2
        # Questions repeat: the same words in other scenes, the same scene in every epoch.
        self._encode = functools.lru_cache(maxsize=_QUESTIONS_KEPT)(tokenizer.encode)
        self._questions = functools.lru_cache(maxsize=_QUESTIONS_KEPT)(self._encode_questions)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        inputs = {
            **self._texts([example.text for example in examples]),
            **self._images([example.image for example in examples]),
            **self._aux([example.aux for example in examples]),
        }
        rows: Any = np.stack([self._questions(e.prompts, e.answers) for e in examples])
        return Batch(Inputs(**inputs), rows[..., :-2], rows[..., -2], rows[..., -1], self._paired)

    def _encode_questions(
        self, prompts: tuple[str, ...], answers: tuple[str, ...]
    ) -> Int[np.ndarray, "Q columns"]:
        """One row a question: its padded tokens, its prompt length and its length."""
        tokenizer, rows = self._tokenizer, []
        for prompt, answer in zip(prompts, answers, strict=True):
            start = [tokenizer.bos_id, *self._encode(prompt)]
            ids = [*start, *self._encode(answer), tokenizer.eos_id]
            padded = _pad(ids, self._question_length, tokenizer.pad_id)
            rows.append([*padded, len(start), len(ids)])
        return np.array(rows, np.int32)

    def _texts(self, texts: Sequence[str | None]) -> dict[str, Any]:
        if "text" not in self._streams:
            return {}
        ids = [self._tokenizer.encode(text or "") for text in texts]
        rows = [_pad(row, self._longest, self._tokenizer.pad_id) for row in ids]
        lengths = np.array([len(row) for row in ids])
        mask = np.arange(self._longest) < lengths[:, None]
        complete = self._complete and self._shortest == self._longest
        return _masked("text", np.array(rows, np.int32), None if complete else mask)

    def _images(self, images: Sequence[np.ndarray | None]) -> dict[str, Any]:
        if "image" not in self._streams:
            return {}
        blank = np.zeros((*self._image_size, 3), np.uint8)
        stacked = np.stack([blank if image is None else image for image in images])
        mask = np.array([image is not None for image in images])
        return _masked("image", stacked, None if self._complete else mask)

    def _aux(self, auxs: Sequence[np.ndarray | None]) -> dict[str, Any]:
        if "aux" not in self._streams:
            return {}
        stacked = np.stack([aux for aux in auxs if aux is not None])
        known = np.logical_not(np.isnan(stacked).any(axis=-1))
        known_or_0 = np.where(known[..., None], stacked, 0)
        return _masked("aux", known_or_0, None if self._complete else known)


def _masked(name: str, value: np.ndarray, mask: np.ndarray | None) -> dict[str, Any]:
    return {name: value} if mask is None else {name: value, f"{name}_mask": mask}


def _pad(ids: list[int], length: int, pad_id: int) -> list[int]:
    if len(ids) > length:
        raise InputError(
            f"a text has {len(ids)} tokens, and its source promised at most {length}; "
            "correct its text_lengths or question_length"
        )
    return ids + [pad_id] * (length - len(ids))
