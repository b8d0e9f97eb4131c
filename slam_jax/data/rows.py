"""Rows of a table, each with a question and an answer, as a `Source`."""

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from slam_jax.data.augmentation import augment
from slam_jax.data.config import DataConfig
from slam_jax.data.formats.base import open_picture
from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.images import as_pictures, load_image
from slam_jax.data.mixture import MixedOrder
from slam_jax.data.numbers import AuxFormat
from slam_jax.data.pipeline import Example, RecordLengths
from slam_jax.data.records import DamagedRecord, Mapped, Records
from slam_jax.data.views import TRAINING_VIEWS
from slam_jax.errors import InputError
from slam_jax.slam_v3.config import SlamV3Config

ANY_KIND = "all"
CORPUS_ROWS = 20_000
"""How many rows are read as a sample of all texts."""

_MAX_CACHE_BYTES = 1 << 29
_TEXTS_KEPT = 1 << 14


class Row(NamedTuple):
    """A question and what it is about.

    image: anything that `load_image` takes, a `slam_jax.data.formats.StoredPicture`, a tuple of
      several of these, or None.
    numbers: one for each number column, NaN = missing; None where the table has no such columns.
    answers: the right answers. Training learns one of them, drawn at random each time.
    kind: the kind of question. where: the file and the row in it, for messages.
    """

    image: Any
    text: str | None
    numbers: Float[np.ndarray, "A"] | None
    prompt: str
    answers: tuple[str, ...]
    kind: str = ANY_KIND
    where: str = ""


class Texts(NamedTuple):
    """The texts of a row, with one of its answers."""

    text: str
    prompt: str
    answer: str


class Lengths(NamedTuple):
    """Lengths of texts in tokens.

    text: the smallest and the largest of a text. question: the largest of a prompt and its answer
    together. answer: the largest of an answer.
    """

    text: tuple[int, int]
    question: int
    answer: int


def texts_of(rows: Sequence[Any], most: int | None = None) -> Iterator[Texts]:
    """The texts of the first `most` rows, once for each answer. Damaged rows are skipped."""
    for i in range(len(rows))[:most]:
        with contextlib.suppress(DamagedRecord):
            yield from _texts_of_row(rows[i])


def _texts_of_row(row: Row) -> Iterator[Texts]:
    return (Texts(row.text or "", row.prompt, answer) for answer in row.answers)


def measure(texts: Iterable[Texts], tokenizer: AnyTokenizer) -> Lengths:
    """The lengths that the texts have."""
    count = functools.lru_cache(maxsize=None)(lambda text: len(tokenizer.encode(text)))
    lengths = [tuple(map(count, each)) for each in texts] or [(0, 0, 0)]
    text, _, answer = zip(*lengths, strict=True)
    question = max(prompt + answer for _, prompt, answer in lengths)
    return Lengths((min(text), max(text)), question, max(answer))


class TokenCounts(NamedTuple):
    """For each row the numbers of tokens of its text, of its prompt with its longest answer, and
    of its longest answer."""

    text: Int[np.ndarray, "n"]
    question: Int[np.ndarray, "n"]
    answer: Int[np.ndarray, "n"]

    def lengths(self) -> Lengths:
        """Their bounds, as of `measure`."""
        if not len(self.text):
            return Lengths((0, 0), 0, 0)
        text = int(self.text.min()), int(self.text.max())
        return Lengths(text, int(self.question.max()), int(self.answer.max()))


def count_tokens(rows: Sequence[Row], tokenizer: AnyTokenizer) -> TokenCounts:
    """The numbers of tokens of each row."""
    count = functools.lru_cache(maxsize=_TEXTS_KEPT)(lambda text: len(tokenizer.encode(text)))
    found = np.zeros((3, len(rows)), np.int32)
    for i, row in enumerate(rows):
        answer = max(map(count, row.answers))
        text = len(tokenizer.encode(row.text)) if row.text else 0
        found[:, i] = text, count(row.prompt) + answer, answer
    return TokenCounts(*found)


class Rows(Records):
    """A split of a table as a `Source`.

    Args:
      rows: a `Row` by index; indexing raises for a row that cannot be read.
      name: the name of the split, for messages.
      config: pictures are resized and changed at random, and inputs dropped, as it says.
        `max_damaged_records` rows may be damaged.
      model: gives the size and number of pictures and the width of auxiliary vectors.
      streams: the inputs that the table has. lacking: those of them that some rows do not have.
      aux_format: the format of the number columns, if there are any.
      lengths: of all texts, where they are known without reading the rows.
      counted: the tokenizer with which the tokens of each row were counted, and their numbers.
      weights: of each part of a mixture the number of rows and the weight; see `MixedOrder`.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        name: str,
        config: DataConfig,
        model: SlamV3Config,
        *,
        streams: Sequence[str],
        lacking: Sequence[str] = (),
        aux_format: AuxFormat | None = None,
        lengths: Lengths | None = None,
        counted: tuple[AnyTokenizer, TokenCounts] | None = None,
        weights: Sequence[tuple[int, float]] = (),
    ):
        image, most = model.image, config.max_damaged_records
        size, how = image.size, image.preprocessing or config.resize
        decode = functools.partial(_decode, size=size, how=how, most=image.max_images)
        kept = max(1, _MAX_CACHE_BYTES // (3 * size**2 * image.max_images))
        super().__init__(Mapped(rows, decode, kept), name, most)
        undecoded = Records(rows, name, most)
        self.rows, self._undecoded = rows, undecoded
        self.image_size, self.max_images = (size, size), image.max_images
        self._config, self._drop_inputs = config, config.drop_inputs
        self._streams, self._lacking = frozenset(streams), frozenset(lacking)
        self._aux_format, self._aux_width = aux_format, model.aux_dim
        self._known, self._counted, self._weights = lengths, counted, weights
        # Counted once for each tokenizer; nearly always there is one, that of the data set.
        self._lengths = functools.lru_cache(maxsize=4)(self._measure)
        self._by_row = functools.lru_cache(maxsize=4)(self._measure_rows)

    def _measure(self, tokenizer: AnyTokenizer) -> Lengths:
        if self._known is not None:
            return self._known
        if self._counted is not None and self._counted[0] == tokenizer:
            return self._counted[1].lengths()
        return measure(texts_of(self._undecoded), tokenizer)

    def _measure_rows(self, tokenizer: AnyTokenizer) -> list[RecordLengths | None] | None:
        if self._known is not None:
            return None
        if self._counted is not None and self._counted[0] == tokenizer:
            counts = self._counted[1]
            pairs = zip(counts.text.tolist(), counts.question.tolist(), strict=True)
            return [RecordLengths(text, question + 2) for text, question in pairs]
        return _lengths_by_row(self._undecoded, tokenizer)

    @property
    def views(self) -> tuple[str, ...]:
        """The views whose streams the table has. `all` shows what there is."""
        return tuple(
            name
            for name, view in TRAINING_VIEWS.items()
            if not view.split and (name == "all" or self._streams.issuperset(view.streams))
        )

    def contents(self, record: Row) -> tuple[bytes, ...]:
        """An identity of each picture of the record; without one, of its text or numbers."""
        if record.image is not None:
            pictures = [record.image] if record.image.ndim == 3 else record.image
            shown = [picture.tobytes() for picture in pictures]
        elif record.text is not None:
            shown = [record.text.encode(errors="surrogatepass")]
        else:
            shown = [np.asarray(record.numbers).tobytes()]
        return tuple(dict.fromkeys(hashlib.sha256(each).digest()[:16] for each in shown))

    def render(self, record: Row, view: str, rng: np.random.Generator) -> Example:
        shown = self.streams(view)
        dropped = self._drop(record, shown, rng)
        answer = record.answers[int(rng.integers(len(record.answers)))]
        aux, numbers = None, None
        if "aux" in shown and self._aux_format is not None:
            aux = self._aux_format.encode(record.numbers, self._aux_width)
            if "aux" in dropped:
                aux[:] = np.nan
            else:
                numbers = tuple(np.asarray(record.numbers).tolist())
        image = record.image if "image" in shown and "image" not in dropped else None
        if image is not None:
            alone = image.ndim == 3
            changed = augment([image] if alone else list(image), self._config, rng)
            image = changed[0] if alone else np.stack(changed)
        return Example(
            text=record.text if "text" in shown and "text" not in dropped else None,
            image=image,
            aux=aux,
            prompts=(record.prompt,),
            answers=(answer,),
            kinds=(record.kind,),
            needs_both=(False,),
            numbers=numbers,
            references=(record.answers,),
            place=record.where,
        )

    def _drop(self, record: Row, shown: Sequence[str], rng: np.random.Generator) -> set[str]:
        """The inputs to leave out this time. At least one input of the row always stays."""
        if not self._drop_inputs:
            return set()
        numbers = None if record.numbers is None or np.isnan(record.numbers).all() else True
        parts = {"text": record.text, "image": record.image, "aux": numbers}
        present = [name for name in shown if parts[name] is not None]
        kept = [name for name in present if rng.random() >= self._drop_inputs]
        if present and not kept:
            kept = [present[int(rng.integers(len(present)))]]
        return set(present) - set(kept)

    def streams(self, view: str) -> tuple[str, ...]:
        return tuple(s for s in TRAINING_VIEWS[view].streams if s in self._streams)

    def complete(self, view: str) -> bool:
        streams = self.streams(view)
        dropping = self._drop_inputs > 0 and len(streams) > 1
        return self._lacking.isdisjoint(streams) and not dropping

    def paired(self, view: str) -> bool:
        return view == "image_text" and self.complete(view)

    def text_lengths(self, view: str, tokenizer: AnyTokenizer) -> tuple[int, int]:
        return self._lengths(tokenizer).text

    def question_length(self, tokenizer: AnyTokenizer) -> int:
        return self._lengths(tokenizer).question

    def answer_length(self, tokenizer: AnyTokenizer) -> int:
        return self._lengths(tokenizer).answer

    def lengths(self, index: int, tokenizer: AnyTokenizer) -> RecordLengths | None:
        """Bounds of the lengths of a record, from its texts alone; None where they are unknown.

        They are the same in all processes, also where a picture cannot be read.
        """
        by_row = self._by_row(tokenizer)
        return None if by_row is None else by_row[index]

    def order(self, seed: int) -> MixedOrder | None:
        """The order of training on a mixture; None where there are no weights."""
        return MixedOrder(self._weights, seed) if self._weights else None

    def answers(self) -> Iterator[str]:
        return (texts.answer for texts in texts_of(self._undecoded, CORPUS_ROWS))


def _lengths_by_row(rows: Sequence[Any], tokenizer: AnyTokenizer) -> list[RecordLengths | None]:
    """The lengths of each row with its longest answer; None for a row that cannot be read."""
    found: list[RecordLengths | None] = [None] * len(rows)
    for i in range(len(rows)):
        with contextlib.suppress(DamagedRecord):
            lengths = measure(_texts_of_row(rows[i]), tokenizer)
            found[i] = RecordLengths(lengths.text[1], lengths.question + 2)
    return found


def too_many(count: int, most: int) -> str:
    """What is wrong with a row or a request of `count` pictures where a model reads `most`."""
    return f"{count} pictures; the model reads at most model.image.max_images={most}"


def _decode(row: Row, size: int, how: Any, most: int) -> Row:
    """The row with its picture as pixels [H, W, 3]; [n, H, W, 3] where it may have several."""
    pictures = as_pictures(row.image)
    if not pictures:
        return row._replace(image=None)
    try:
        if len(pictures) > most:
            raise InputError(too_many(len(pictures), most))
        pixels = [load_image(open_picture(picture), size, how) for picture in pictures]
        return row._replace(image=pixels[0] if most == 1 else np.stack(pixels))
    except InputError as error:
        raise InputError(f"{row.where}, image: {error}" if row.where else str(error)) from None
