"""Rows of a table, each with a question and an answer, as a `Source`."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from slam_jax.data.images import crop_at_random, load_image
from slam_jax.data.numbers import AuxFormat
from slam_jax.data.pipeline import Example
from slam_jax.data.records import DamagedRecord, Records
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.data.views import TRAINING_VIEWS
from slam_jax.errors import InputError

ANY_KIND = "all"
_CORPUS_ROWS = 20_000
_BYTES_KEPT = 1 << 29
_LENGTHS_KEPT = 64


class Row(NamedTuple):
    """A question and what it is about.

    image: what `load_image` takes, or None. numbers: one for each column, NaN = missing; or None.
    answers: one of them is drawn each time, to be learned or to be matched. kind: of the question.
    where: the row stands, for messages.
    """

    image: Any
    text: str | None
    numbers: Float[np.ndarray, "A"] | None
    prompt: str
    answers: tuple[str, ...]
    kind: str = ANY_KIND
    where: str = ""


class Texts(NamedTuple):
    """What of a row is text."""

    text: str
    prompt: str
    answer: str


class Rows:
    """A split of a table.

    Args:
      rows: a `Row` by index; may raise for one that cannot be read, so none is read to check it.
      name: of the split, for messages.
      size: pixels a side that images are brought to. augment: share of a side that may be cropped,
        at random, each time one is shown. drop_inputs: rate at which an input is left out.
      aux_format, aux_width: of the columns of numbers, if there are any, and of each one's vector.
      lacking: those of the streams that some rows do not have.
      texts: every text there can be; None = those of all rows, which are read for them.
      longest: tokens that a prompt and its answer have at most, so that rows without texts need not
        be read; None = counted.
      max_damaged: how many rows may not be readable.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        name: str,
        *,
        size: int,
        augment: float = 0.0,
        drop_inputs: float = 0.0,
        streams: Sequence[str],
        aux_format: AuxFormat | None = None,
        aux_width: int = 1,
        lacking: Sequence[str] = (),
        texts: Iterable[Texts] | None = None,
        longest: int | None = None,
        max_damaged: int = 0,
    ):
        self.rows = rows
        self.undecoded = Records(rows, name, max_damaged)
        self.records = Records(_Decoded(rows, size), name, max_damaged)
        self.image_size = (size, size)
        self._augment, self._drop_inputs = augment, drop_inputs
        self._streams = frozenset(streams)
        self._aux_format, self._aux_width = aux_format, aux_width
        self._lacking = frozenset(lacking)
        self._given_texts = None if texts is None else tuple(texts)
        self._longest = longest

    @property
    def views(self) -> tuple[str, ...]:
        """Those whose streams the table has; `all` shows what there is."""
        return tuple(
            name
            for name, view in TRAINING_VIEWS.items()
            if not view.split and (name == "all" or self._streams.issuperset(view.streams))
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.records[index]

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
        if image is not None and self._augment:
            image = crop_at_random(image, rng, self._augment)
        return Example(
            text=record.text if "text" in shown and "text" not in dropped else None,
            image=image,
            aux=aux,
            prompts=(record.prompt,),
            answers=(answer,),
            kinds=(record.kind,),
            needs_both=(False,),
            numbers=numbers,
        )

    def _drop(self, record: Row, shown: Sequence[str], rng: np.random.Generator) -> frozenset[str]:
        """The inputs to leave out this time; one of those that the row has always stays."""
        if not self._drop_inputs:
            return frozenset()
        numbers = None if record.numbers is None or np.isnan(record.numbers).all() else True
        parts = {"text": record.text, "image": record.image, "aux": numbers}
        given = [name for name in shown if parts[name] is not None]
        kept = [name for name in given if rng.random() >= self._drop_inputs]
        if given and not kept:
            kept = [given[int(rng.integers(len(given)))]]
        return frozenset(given) - frozenset(kept)

    def streams(self, view: str) -> tuple[str, ...]:
        return tuple(s for s in TRAINING_VIEWS[view].streams if s in self._streams)

    def complete(self, view: str) -> bool:
        streams = self.streams(view)
        dropping = self._drop_inputs > 0 and len(streams) > 1
        return self._lacking.isdisjoint(streams) and not dropping

    def paired(self, view: str) -> bool:
        return view == "image_text" and self.complete(view)

    def text_lengths(self, view: str, tokenizer: Tokenizer) -> tuple[int, int]:
        return self._lengths(tokenizer).text

    def question_length(self, tokenizer: Tokenizer) -> int:
        return self._lengths(tokenizer).question

    def answer_length(self, tokenizer: Tokenizer) -> int:
        return self._lengths(tokenizer).answer

    def corpus(self) -> Iterator[str]:
        for texts in self._texts(_CORPUS_ROWS):
            yield from texts

    def answers(self) -> Iterator[str]:
        for i in range(len(self))[:_CORPUS_ROWS]:
            with contextlib.suppress(DamagedRecord):
                yield from self.undecoded[i].answers

    @functools.cached_property
    def _lengths(self) -> Any:
        return functools.lru_cache(maxsize=_LENGTHS_KEPT)(self._measure)

    def _measure(self, tokenizer: Tokenizer) -> "_Lengths":
        if self._longest is not None:
            return _Lengths((0, 0), self._longest, self._longest)
        count = functools.lru_cache(maxsize=None)(lambda text: len(tokenizer.encode(text)))
        lengths = [tuple(map(count, texts)) for texts in self._texts(None)]
        if not lengths:
            return _Lengths((0, 0), 0, 0)
        texts, _, answers = zip(*lengths, strict=True)
        question = max(prompt + answer for _, prompt, answer in lengths)
        return _Lengths((min(texts), max(texts)), question, max(answers))

    def _texts(self, most: int | None) -> Iterator[Texts]:
        if self._given_texts is not None:
            yield from self._given_texts
            return
        for i in range(len(self))[:most]:
            try:
                row = self.undecoded[i]
            except DamagedRecord:
                continue
            for answer in row.answers:
                yield Texts(row.text or "", row.prompt, answer)


class _Lengths(NamedTuple):
    text: tuple[int, int]
    question: int
    answer: int


class _Decoded(Sequence[Row]):
    """Rows with their pictures as pixels, of which as many are kept as fit into half a GiB."""

    def __init__(self, rows: Sequence[Any], size: int):
        self._rows, self._size = rows, size
        kept = max(1, _BYTES_KEPT // (3 * size**2))
        self._read = functools.lru_cache(maxsize=kept)(self._decode)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._read(index)

    def _decode(self, index: int) -> Row:
        row = self._rows[index]
        if row.image is None:
            return row
        try:
            return row._replace(image=load_image(row.image, self._size))
        except InputError as error:
            raise InputError(f"{row.where}, image: {error}" if row.where else str(error)) from None
