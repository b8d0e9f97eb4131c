"""Sort-of-CLEVR scenes rendered as images, texts and auxiliary vectors."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from slam_jax.data.pipeline import Example
from slam_jax.data.records import DamagedRecord
from slam_jax.data.sort_of_clevr import (
    ANSWERS,
    COLOURS,
    KINDS,
    PROMPTS,
    QUESTIONS_PER_KIND,
    RADIUS,
    SHAPES,
    SIZE,
    draw,
    needs_both,
)
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.data.views import VIEWS

_CORPUS_SCENES = 2000
_CACHED_SCENES = 1 << 14
_KINDS = tuple(kind for kind in KINDS for _ in range(QUESTIONS_PER_KIND))
_NONE_NEEDS_BOTH = (False,) * len(_KINDS)
# Indexed [colour][kind][subtype], like a stored question.
_PROMPTS = [[[p.format(colour) for p in kind] for kind in PROMPTS] for colour in COLOURS]


def describe(objects: Int[np.ndarray, "6 3"], order: Sequence[int]) -> str:
    """One sentence per colour index in `order`: "red circle at 12 40 .", x and y in pixels."""
    rows = objects.tolist()
    return " ".join(
        f"{COLOURS[colour]} {SHAPES[rows[colour][0]]} at {rows[colour][1]} {rows[colour][2]} ."
        for colour in order
    )


def tabulate(objects: Int[np.ndarray, "6 3"], order: Sequence[int]) -> Float[np.ndarray, "A 10"]:
    """One row per colour index in `order`: one-hot colour (6) and shape (2), x and y in [-1, 1]."""
    colour = np.asarray(order)
    shape, centre = objects[colour, 0], objects[colour, 1:]
    place = centre * (2 / (SIZE - 1)) - 1
    return np.concatenate([np.eye(6)[colour], np.eye(2)[shape], place], -1).astype(np.float32)


class Scene(NamedTuple):
    """A stored scene (arrays as in `SortOfClevr`) with its questions and answers as text."""

    objects: Int[np.ndarray, "6 3"]
    questions: Int[np.ndarray, "20 3"]
    answers: Int[np.ndarray, "20"]
    prompt_texts: tuple[str, ...]
    answer_texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A split of Sort-of-CLEVR as a `Source`.

    records: random access to the features of `SortOfClevr`. Pictures are drawn from the objects,
    which is faster than decoding the stored, equal ones. Objects come in random order; in a split
    view one rendering shows the first three of that order and the other one the last three.
    """

    records: Sequence[dict[str, Any]]

    views = tuple(VIEWS)
    image_size = (SIZE, SIZE)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Scene:
        return self._scene(index)

    @functools.cached_property
    def _scene(self) -> Any:
        return functools.lru_cache(maxsize=_CACHED_SCENES)(self._read)

    def _read(self, index: int) -> Scene:
        record = self.records[index]
        questions, answers = record["questions"], record["answers"]
        prompt_texts = tuple(_PROMPTS[c][kind][subtype] for c, kind, subtype in questions.tolist())
        answer_texts = tuple(ANSWERS[answer] for answer in answers.tolist())
        return Scene(record["objects"], questions, answers, prompt_texts, answer_texts)

    def render(self, record: Scene, view: str, rng: np.random.Generator) -> Example:
        parts, objects = VIEWS[view], record.objects
        order = rng.permutation(len(COLOURS)).tolist()
        both = _NONE_NEEDS_BOTH
        if parts.split:
            both = tuple(needs_both(objects, record.questions, record.answers, order[:3]).tolist())
        return Example(
            text=None if parts.text is None else describe(objects, order[parts.text]),
            image=None if parts.image is None else draw(objects, order[parts.image]),
            aux=None if parts.aux is None else tabulate(objects, order[parts.aux]),
            prompts=record.prompt_texts,
            answers=record.answer_texts,
            kinds=_KINDS,
            needs_both=both,
        )

    def text_lengths(self, view: str, tokenizer: Tokenizer) -> tuple[int, int]:
        shown = VIEWS[view].text
        if shown is None:
            return 0, 0
        # Byte-level BPE never merges across a space: the lengths of the words add up.
        sentences = [
            [f"{start}{colour} {shape} at" for colour in COLOURS for shape in SHAPES]
            for start in ("", " ")
        ]
        numbers = [f" {n}" for n in range(RADIUS, SIZE - RADIUS)]
        count = len(range(*shown.indices(len(COLOURS))))

        def extreme(choose: Any) -> int:
            first, later, number, stop = (
                choose(len(tokenizer.encode(word)) for word in words)
                for words in (*sentences, numbers, [" ."])
            )
            return first + (count - 1) * later + count * (2 * number + stop)

        return extreme(min), extreme(max)

    def streams(self, view: str) -> tuple[str, ...]:
        return VIEWS[view].streams

    def complete(self, view: str) -> bool:
        return True

    def paired(self, view: str) -> bool:
        parts = VIEWS[view]
        return parts.text is not None and parts.text == parts.image

    def question_length(self, tokenizer: Tokenizer) -> int:
        prompts = [prompt for kinds in _PROMPTS for kind in kinds for prompt in kind]
        return max(len(tokenizer.encode(t)) for t in prompts) + self.answer_length(tokenizer)

    def answer_length(self, tokenizer: Tokenizer) -> int:
        return max(len(tokenizer.encode(answer)) for answer in ANSWERS)

    def corpus(self) -> Iterator[str]:
        for i in range(min(len(self), _CORPUS_SCENES)):
            with contextlib.suppress(DamagedRecord):
                example = self.render(self[i], "text", np.random.default_rng((0, i)))
                yield from (example.text or "", *example.prompts, *example.answers)

    def answers(self) -> Iterator[str]:
        for i in range(min(len(self), _CORPUS_SCENES)):
            with contextlib.suppress(DamagedRecord):
                yield from self[i].answer_texts
