"""Batches from any source of examples; each is a pure function of (seed, global step)."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8

from slam_jax.batch import Batch
from slam_jax.data.config import DataConfig
from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.order import UNCHANGED, Order, evaluation_order
from slam_jax.data.records import DamagedRecord, DataError, Rebuilt
from slam_jax.errors import InputError
from slam_jax.slam_v3.streams import Inputs

_THREADS = 2
_PREFETCHED_BATCHES = 4
_QUESTIONS_KEPT = 1 << 14
_SHORTEST_BUCKET = 16


class RecordLengths(NamedTuple):
    """Numbers of tokens of a text, and of <bos>, a prompt, its answer and <eos> together."""

    text: int
    question: int


class Example(NamedTuple):
    """An example as one view shows it. All examples of a view have the same number Q of prompts.

    text, image, aux: None where the view does not show it or the record lacks it. Rows of `aux`
      that the record lacks are NaN. The image has an axis n of pictures where the source has
      `max_images` above 1.
    needs_both: for each prompt, whether the answer needs both inputs of a split scene.
    numbers: the numbers that `aux` encodes, NaN = missing. None where the data set has no number
      columns or the view does not show them.
    references: for each prompt, all of its right answers; () = `answers` are the only ones.
    place: where the record was read, for people: "data.csv, row 7"; "" = not known.
    record, contents: set by `evaluation_batches`: the index of the record, and what
      `Source.contents` says.
    """

    text: str | None
    image: UInt8[np.ndarray, "*n H W 3"] | None
    aux: Float[np.ndarray, "A C"] | None
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    kinds: tuple[str, ...]
    needs_both: tuple[bool, ...]
    numbers: tuple[float, ...] | None = None
    references: tuple[tuple[str, ...], ...] = ()
    place: str = ""
    record: int | None = None
    contents: tuple[bytes, ...] = ()

    @property
    def pictures(self) -> Sequence[UInt8[np.ndarray, "H W 3"]]:
        """The pictures of the image, which may be one, several or none."""
        if self.image is None:
            return ()
        return [self.image] if self.image.ndim == 3 else list(self.image)

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

    A source may also have `lengths(index, tokenizer)`, see `Rows.lengths`. Without it, several
    processes pad all texts to the longest. It may have `order(seed)`, an endless sequence of
    indices that training follows instead of reshuffling all records every epoch. And `max_images`,
    how many pictures an example has at most; above 1, those of a batch are
    [B, max_images, H, W, 3] with a mask. And `contents(record)`, an identity of each picture that
    the record shows; without one, of its text or numbers. Intervals take answers about the same
    as one scene. Without it, each record is a scene.
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
    def text_lengths(self, view: str, tokenizer: AnyTokenizer) -> tuple[int, int]: ...
    def question_length(self, tokenizer: AnyTokenizer) -> int: ...
    def answer_length(self, tokenizer: AnyTokenizer) -> int: ...
    def answers(self) -> Iterator[str]: ...


class EvaluationBatch(NamedTuple):
    """A batch and its examples. The first `valid` rows count; the others repeat the last example,
    so that all batches have the same shape. `examples` holds the valid ones."""

    batch: Batch
    examples: list[Example]
    valid: int


def training_batches(
    source: Source,
    tokenizer: AnyTokenizer,
    config: DataConfig,
    *,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    order: Order = UNCHANGED,
) -> Iterator[tuple[str, Batch]]:
    """Endless (view, batch) from step `start_step` on, as numpy arrays, prefetched.

    Step s gives the same examples whatever the start and the number of processes. Examples are
    reshuffled every epoch. A damaged record is replaced by the next one that can be read, and that
    is not in a longer bucket. Close the iterator where `config.workers` is not 0.

    rows: the rows of each global batch that this process needs; None = all. order: of a run that
    was changed; `start_step` is not before its first step.
    """
    rows = range(config.batch_size) if rows is None else rows
    batch_of = _BatchOfStep(source, tokenizer, config, rows, order)
    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch_of)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
    batches = steps.to_iter_dataset(options)
    if config.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes flags of its own to its processes
        # Through pipes: Grain leaves blocks of shared memory behind where it is closed early.
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        batches = grain.experimental.WithOptionsIterDataset(batches, pipes)
        processes = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(processes)
    return iter(batches)


class _BatchOfStep(Rebuilt):
    """The (view, batch) of a step; see `training_batches`."""

    def __init__(
        self,
        source: Source,
        tokenizer: AnyTokenizer,
        config: DataConfig,
        rows: Sequence[int],
        order: Order,
    ):
        self._source, self._config, self._rows, self._order = source, config, rows, order
        seed = order.seed(config.seed)
        own = getattr(source, "order", lambda seed: None)(seed)
        if own is None:
            shuffled = grain.MapDataset.source(range(len(source))).seed(seed).shuffle()
            self._indices: Any = shuffled.repeat()
        else:
            self._indices = grain.MapDataset.source(own).seed(seed)
        bucketed = config.bucket_lengths
        self._collate = {v: _Collate(source, tokenizer, v, bucketed) for v in config.views}
        self._examples: dict[str, Any] = {
            view: self._indices.random_map(functools.partial(self._render, view))
            for view in config.views
        }

    def __call__(self, step: int) -> tuple[str, Batch]:
        size, view = self._config.batch_size, self._config.view(step)
        collate, longest = self._collate[view], None
        first = self._order.start(step, size)
        examples = [self._examples[view][first + row] for row in self._rows]
        if self._config.bucket_lengths and len(self._rows) < size:
            # All processes must pad alike, and each reads its own rows alone.
            longest = collate.longest(self._indices[first + row] for row in range(size))
        return view, collate(examples, longest)

    def _render(self, view: str, index: int, rng: np.random.Generator) -> Example:
        return self._source.render(self._read_from(index, self._collate[view]), view, rng)

    def _read_from(self, index: int, collate: "_Collate") -> Any:
        """The record of this index, or the next one that can be read and is in no longer bucket."""
        count, advice = len(self._source), "build the data set again"
        for i in range(count):
            other = (index + i) % count
            if i and not collate.replaces(other, index):
                advice = (
                    f"or longer than record {index}; repair it, or set data.bucket_lengths=False"
                )
                continue
            with contextlib.suppress(DamagedRecord):
                return self._source[other]
        raise DataError(f"all {count} records are damaged; {advice}")


def evaluation_batches(
    source: Source,
    tokenizer: AnyTokenizer,
    view: str,
    batch_size: int,
    *,
    seed: int,
    shuffled: bool = False,
) -> Iterator[EvaluationBatch]:
    """Every example of `source` once: in order, or `shuffled` in the same way each time, so that
    the first batches are a sample of all.

    Records that are damaged or lack all inputs of the view are skipped. Example i depends on
    (seed, i) and the view alone. All views of a scene make the same random choices, so the two
    halves of a split view complete each other.
    """
    collate = _Collate(source, tokenizer, view)
    contents = getattr(source, "contents", lambda record: ())

    def examples() -> Iterator[Example]:
        for i in evaluation_order(len(source), shuffled):
            with contextlib.suppress(DamagedRecord):
                record = source[i]
                example = source.render(record, view, np.random.default_rng((seed, i)))
                if example.shows_something:
                    yield example._replace(record=i, contents=contents(record))

    remaining = examples()
    while chosen := list(itertools.islice(remaining, batch_size)):
        padding = chosen[-1:] * (batch_size - len(chosen))
        yield EvaluationBatch(collate(chosen + padding), chosen, len(chosen))


class _Collate:
    """Makes a `Batch` of examples of one view.

    bucketed: texts and questions are padded to the next power of two from 16 on, or to the longest
    of the source where that is shorter; otherwise always to the longest, so that all batches of as
    many examples have the same shape.
    """

    def __init__(self, source: Source, tokenizer: AnyTokenizer, view: str, bucketed: bool = False):
        self._source, self._tokenizer, self._bucketed = source, tokenizer, bucketed
        self._shortest, longest = source.text_lengths(view, tokenizer)
        self._longest = RecordLengths(longest, source.question_length(tokenizer) + 2)
        self._streams, self._image_size = source.streams(view), source.image_size
        self._max_images = getattr(source, "max_images", 1)
        self._complete = source.complete(view)
        self._paired = source.paired(view)
        # Questions repeat: the same words in other scenes, the same scene in every epoch.
        self._encode = functools.lru_cache(maxsize=_QUESTIONS_KEPT)(tokenizer.encode)
        self._questions = functools.lru_cache(maxsize=_QUESTIONS_KEPT)(self._encode_questions)

    def __call__(self, examples: Sequence[Example], longest: RecordLengths | None = None) -> Batch:
        """longest: the lengths to choose buckets by, None = those of the examples."""
        rows: Any = np.stack([self._questions(e.prompts, e.answers) for e in examples])
        texts = [self._tokenizer.encode(example.text or "") for example in examples]
        longest = longest or RecordLengths(max(map(len, texts)), int(rows[..., -1].max()))
        sizes = self._buckets(longest) if self._bucketed else self._longest
        inputs = {
            **self._texts(texts, sizes.text),
            **self._images([example.image for example in examples]),
            **self._aux([example.aux for example in examples]),
        }
        tokens = rows[..., : sizes.question]
        return Batch(Inputs(**inputs), tokens, rows[..., -2], rows[..., -1], self._paired)

    def longest(self, indices: Iterable[int]) -> RecordLengths:
        """Bounds of the lengths of these records; of all, where the source knows no others."""
        found = [self._lengths(index) for index in indices]
        return RecordLengths(*(max(lengths) for lengths in zip(*found, strict=True)))

    def replaces(self, other: int, index: int) -> bool:
        """Whether one record is in no longer bucket than another."""
        if not self._bucketed:
            return True
        sizes, most = (self._buckets(self._lengths(i)) for i in (other, index))
        return sizes.text <= most.text and sizes.question <= most.question

    def _lengths(self, index: int) -> RecordLengths:
        known = getattr(self._source, "lengths", None)
        return (known and known(index, self._tokenizer)) or self._longest

    def _buckets(self, lengths: RecordLengths) -> RecordLengths:
        pairs = zip(lengths, self._longest, strict=True)
        return RecordLengths(*(min(most, _power_of_2(length)) for length, most in pairs))

    def _encode_questions(
        self, prompts: tuple[str, ...], answers: tuple[str, ...]
    ) -> Int[np.ndarray, "Q columns"]:
        """One row a question: its padded tokens, its prompt length and its length."""
        tokenizer, rows = self._tokenizer, []
        for prompt, answer in zip(prompts, answers, strict=True):
            start = tokenizer.encode_prompt(prompt)
            ids = [*start, *self._encode(answer), tokenizer.eos_id]
            padded = _pad(ids, self._longest.question, tokenizer.pad_id)
            rows.append([*padded, len(start), len(ids)])
        return np.array(rows, np.int32)

    def _texts(self, texts: Sequence[list[int]], size: int) -> dict[str, Any]:
        if "text" not in self._streams:
            return {}
        rows = [_pad(row, size, self._tokenizer.pad_id) for row in texts]
        lengths = np.array([len(row) for row in texts])
        mask = np.arange(size) < lengths[:, None]
        complete = self._complete and self._shortest == self._longest.text
        return _masked("text", np.array(rows, np.int32), None if complete else mask)

    def _images(self, images: Sequence[np.ndarray | None]) -> dict[str, Any]:
        if "image" not in self._streams:
            return {}
        if self._max_images > 1:
            given = [() if image is None else image for image in images]
            return stack_pictures(given, self._max_images, self._image_size)
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


def stack_pictures(
    images: Sequence[Sequence[np.ndarray] | np.ndarray], count: int, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The arrays `image` [B, count, H, W, 3] and `image_mask` [B, count] of examples that have at
    most `count` pictures each, or none."""
    pixels = np.zeros((len(images), count, *size, 3), np.uint8)
    mask = np.zeros((len(images), count), bool)
    for i, pictures in enumerate(images):
        mask[i, : len(pictures)] = True
        for k, picture in enumerate(pictures):
            pixels[i, k] = picture
    return {"image": pixels, "image_mask": mask}


def _power_of_2(length: int) -> int:
    """The smallest bucket for so many tokens."""
    return max(_SHORTEST_BUCKET, 1 << max(length - 1, 0).bit_length())


def _masked(name: str, value: np.ndarray, mask: np.ndarray | None) -> dict[str, Any]:
    return {name: value} if mask is None else {name: value, f"{name}_mask": mask}


def _pad(ids: list[int], length: int, pad_id: int) -> list[int]:
    if len(ids) > length:
        raise InputError(
            f"a text has {len(ids)} tokens, and its source promised at most {length}; "
            "correct its text_lengths or question_length"
        )
    return ids + [pad_id] * (length - len(ids))
