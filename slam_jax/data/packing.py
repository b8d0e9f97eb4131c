"""Rows of tokens for language models; every batch is a pure function of (seed, step).

Texts are cut into pieces that fit into a row, and the pieces are packed into rows once, at the
start. So a row can be read by its number, and a run resumes at any step without reading what came
before. (Grain's packing reads its source in order: to resume it, everything before has to be read
again.) Rows are shuffled in each epoch; which pieces share a row stays the same, and none of them
sees another.
"""

import bisect
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from flax import struct
from jaxtyping import Bool, Int

from slam_jax.array_typing import AnyArray
from slam_jax.data.order import UNCHANGED, Order, evaluation_order
from slam_jax.data.texts import Text
from slam_jax.errors import InputError

_THREADS = 2
_PREFETCHED_BATCHES = 4
# What a template writes as today, which must not change while a run is stopped. It is the date that
# templates of Llama 3 write where nobody gives them one.
_DATE = "2024-07-26"


@struct.dataclass
class TextBatch:
    """Rows of texts, right-padded.

    segments: the number of the text of each token, from 1 on in each row; 0 = a pad. counted: the
    tokens whose prediction counts: all of a document but its first one, or those of an answer.
    packed: whether rows may have several texts; static, not a leaf of the pytree.
    """

    tokens: Int[AnyArray, "B T_1"]
    segments: Int[AnyArray, "B T_1"]
    counted: Bool[AnyArray, "B T_1"]
    packed: bool = struct.field(pytree_node=False, default=True)


class Encoded(NamedTuple):
    """The tokens of a text; from `first` on their prediction counts."""

    ids: Int[np.ndarray, "n"]
    first: int


class Piece(NamedTuple):
    """Tokens `start` to `end` of a text; the first of them is only read."""

    text: int
    start: int
    end: int


def encode_texts(
    tokenizer: Any, texts: Sequence[Text], *, chat: bool
) -> list[Encoded | InputError]:
    """The tokens of each text as the model is to write it, with the end; or why there are none.

    An answer follows its prompt, or with `chat` the conversation as the tokenizer's template writes
    it; its own tokens alone count. Special tokens in a document or an answer are letters like any
    others; a prompt without `chat` is read as `generate` reads it.

    Raises InputError where the template cannot be used at all.
    """
    chats: Iterator[list[int] | InputError] = iter(())
    if chat:
        asked = [each for each in texts if each.prompt is not None]
        conversations = [
            list(each.messages) or [{"role": "user", "content": each.prompt}] for each in asked
        ]
        chats = iter(tokenizer.encode_chats(conversations, date=_DATE))
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    beginning = _beginning(tokenizer)

    def encode(text: Text) -> Encoded:
        first = None
        if text.prompt is None:
            before, first = beginning, 1
        elif chat:
            before = next(chats)
            if isinstance(before, InputError):
                raise before
        else:
            tokenizer.check(text.prompt, "prompt")
            before = tokenizer.encode_prompt(text.prompt)
        ids = [*before, *tokenizer.encode(text.text), *end]
        return Encoded(np.array(ids, np.int32), len(before) if first is None else first)

    found: list[Encoded | InputError] = []
    for text in texts:
        try:
            found.append(encode(text))
        except InputError as error:
            found.append(error)
    return found


def _beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text, such as a BOS."""
    alone, prompt = tokenizer.encode("a"), tokenizer.encode_prompt("a")
    return prompt[: len(prompt) - len(alone)] if prompt[-len(alone) :] == alone else []


def cut(texts: Sequence[Encoded], length: int) -> list[Piece]:
    """Pieces of at most `length` + 1 tokens, such that every token but the first of a text is
    predicted in exactly one of them: a piece begins with the last token of the one before."""
    return [
        Piece(i, start, min(len(text.ids), start + length + 1))
        for i, text in enumerate(texts)
        for start in range(0, len(text.ids) - 1, length)
    ]


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Rows of at most `room` tokens for pieces of these sizes, as lists of their numbers.

    The largest pieces come first; each goes into the fullest row that has room for it. It depends
    on nothing but the sizes.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows with so much room, the last one first
    rooms: list[int] = []  # those of them that have a row, ascending
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(rooms, sizes[piece])
        if at == len(rooms):
            row, left = len(rows), room
            rows.append([])
        else:
            left = rooms[at]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[at]
        rows[row].append(piece)
        left -= sizes[piece]
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class TextRows:
    """The rows of a split.

    texts: those that were encoded. pieces, rows: as `cut` and `pack` made them. width: of a row in
    tokens, T + 1.
    """

    texts: Sequence[Encoded]
    pieces: Sequence[Piece]
    rows: Sequence[Sequence[int]]
    width: int
    pad_id: int
    packed: bool

    @classmethod
    def of(cls, texts: Sequence[Encoded], length: int, *, packed: bool, pad_id: int) -> "TextRows":
        """Packed rows of `length` + 1 tokens; or a piece a row, padded to the longest.

        Raises InputError where there is none.
        """
        pieces = cut(texts, length)
        if not pieces:
            raise InputError("no text has two tokens; give longer ones")
        sizes = [piece.end - piece.start for piece in pieces]
        if packed:
            return cls(texts, pieces, pack(sizes, length + 1), length + 1, pad_id, True)
        return cls(texts, pieces, [[i] for i in range(len(pieces))], max(sizes), pad_id, False)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int]) -> TextBatch:
        """These rows. -1 = a row of pads."""
        tokens = np.full((len(numbers), self.width), self.pad_id, np.int32)
        segments = np.zeros(tokens.shape, np.int32)
        counted = np.zeros(tokens.shape, bool)
        for i, number in enumerate(numbers):
            at = 0
            for segment, piece in enumerate(self.rows[number] if number >= 0 else (), 1):
                text, start, end = self.pieces[piece]
                encoded, here = self.texts[text], slice(at, at + end - start)
                tokens[i, here], segments[i, here] = encoded.ids[start:end], segment
                counted[i, here] = np.arange(start, end) >= max(encoded.first, start + 1)
                at += end - start
        return TextBatch(tokens, segments, counted, self.packed)

    def owners(self, numbers: Sequence[int]) -> Int[np.ndarray, "B T_1"]:
        """The number of the text of each token of `batch`, -1 = a pad."""
        owners = np.full((len(numbers), self.width), -1)
        for i, number in enumerate(numbers):
            at = 0
            for piece in self.rows[number] if number >= 0 else ():
                text, start, end = self.pieces[piece]
                owners[i, at : at + end - start] = text
                at += end - start
        return owners


def text_batches(
    source: TextRows,
    batch_size: int,
    seed: int,
    *,
    start_step: int,
    rows: Sequence[int],
    order: Order = UNCHANGED,
) -> Iterator[tuple[str, TextBatch]]:
    """Endless ("text", batch) from a step on, prefetched; see `training_batches`.

    Step s has the same rows whatever the start and the number of processes. rows: those of each
    batch that this process needs.
    """
    shuffled: Any = grain.MapDataset.source(range(len(source))).seed(order.seed(seed)).shuffle()
    numbers = shuffled.repeat()

    def batch_of(step: int) -> tuple[str, TextBatch]:
        first = order.start(step, batch_size)
        return "text", source.batch([numbers[first + row] for row in rows])

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch_of)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED_BATCHES)
    return iter(steps.to_iter_dataset(options))


def scoring_batches(
    source: TextRows, batch_size: int, *, shuffled: bool = False
) -> Iterator[tuple[TextBatch, Int[np.ndarray, "B T_1"]]]:
    """Every row once, and the text of each token; the last batch is filled with pads. The rows are
    in order, which for packed ones is from the longest texts on, or `shuffled`, so that the first
    batches are a sample of all."""
    order = evaluation_order(len(source), shuffled)
    for start in range(0, len(source), batch_size):
        places = range(start, start + batch_size)
        numbers = [order[i] if i < len(source) else -1 for i in places]
        yield source.batch(numbers), source.owners(numbers)
