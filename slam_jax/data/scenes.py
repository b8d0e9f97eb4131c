"""Sort-of-CLEVR scenes rendered as images, texts and auxiliary vectors."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.pipeline import Example
from slam_jax.data.records import DamagedRecord, Mapped
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
    extremes,
    needs_both,
)
from slam_jax.data.views import VIEWS

_CORPUS_SCENES = 2000
_CACHED_SCENES = 1 << 14
_KINDS = tuple(kind for kind in KINDS for _ in range(QUESTIONS_PER_KIND))
_NONE_NEEDS_BOTH = (False,) * len(_KINDS)
_DESCRIBE, _DESCRIBE_CLOSEST = "describe {}", "describe closest to {}"
# Indexed [colour][kind][subtype], like a stored question.
_PROMPTS = [[[p.format(colour) for p in kind] for kind in PROMPTS] for colour in COLOURS]


def describe(objects: Int[np.ndarray, "n 3"], order: Sequence[int]) -> str:
    """One sentence per colour index in `order`: "red circle at 12 40 .", x and y in pixels."""
    return " ".join(f"{_named(objects, colour)} ." for colour in order)


def _named(objects: Int[np.ndarray, "n 3"], colour: int) -> str:
    """One object: "red circle at 12 40"."""
    return f"{COLOURS[colour]} {_place(objects[colour])}"


def _place(object: Int[np.ndarray, "3"]) -> str:
    """Shape and centre of one object: "circle at 12 40"."""
    shape, x, y = object.tolist()
    return f"{SHAPES[shape]} at {x} {y}"


def tabulate(objects: Int[np.ndarray, "n 3"], order: Sequence[int]) -> Float[np.ndarray, "A 10"]:
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


def _scene(record: dict[str, Any]) -> Scene:
    questions, answers = record["questions"], record["answers"]
    prompt_texts = tuple(_PROMPTS[c][kind][subtype] for c, kind, subtype in questions.tolist())
    answer_texts = tuple(ANSWERS[answer] for answer in answers.tolist())
    return Scene(record["objects"], questions, answers, prompt_texts, answer_texts)


class Scenes(Mapped):
    """A split of Sort-of-CLEVR as a `Source`.

    records: random access to the features of `SortOfClevr`. Pictures are drawn from the objects,
    which is faster than decoding the stored, equal ones. Objects come in random order. In a split
    view one input shows the first three of that order and the other one the last three.
    questions: how many of the twenty questions an example has, in random order; None = all of them
    in their order. descriptions, closest_objects: as in `DataConfig`.
    """

    views = tuple(VIEWS)
    image_size = (SIZE, SIZE)

    def __init__(
        self,
        records: Sequence[Any],
        *,
        questions: int | None = None,
        descriptions: int = 0,
        closest_objects: int = 0,
    ):
        super().__init__(records, _scene, kept=_CACHED_SCENES)
        self._questions = questions
        self._descriptions, self._closest_objects = descriptions, closest_objects

    def render(self, record: Scene, view: str, rng: np.random.Generator) -> Example:
        parts, objects = VIEWS[view], record.objects
        order = rng.permutation(len(COLOURS)).tolist()
        both = _NONE_NEEDS_BOTH
        if parts.split:
            both = tuple(
                needs_both(
                    objects[: len(COLOURS)], record.questions, record.answers, order[:3]
                ).tolist()
            )
        asked = range(len(_KINDS))
        if self._questions is not None:
            asked = rng.permutation(len(_KINDS))[: self._questions].tolist()
        described = list(self._describe(objects[: len(COLOURS)], rng))
        answers = (
            *(record.answer_texts[i] for i in asked),
            *(answer for _, answer in described),
        )
        return Example(
            text=None if parts.text is None else describe(objects, order[parts.text]),
            image=None if parts.image is None else self._draw(objects, order[parts.image], rng),
            aux=None if parts.aux is None else tabulate(objects, order[parts.aux]),
            prompts=(
                *(record.prompt_texts[i] for i in asked),
                *(prompt for prompt, _ in described),
            ),
            answers=answers,
            references=tuple((answer,) for answer in answers),
            kinds=(*(_KINDS[i] for i in asked), *("description" for _ in described)),
            needs_both=(*(both[i] for i in asked), *(False for _ in described)),
        )

    def _describe(
        self, objects: Int[np.ndarray, "6 3"], rng: np.random.Generator
    ) -> Iterator[tuple[str, str]]:
        """The prompts and answers of descriptions and closest objects."""
        if self._descriptions:
            for i in rng.permutation(len(COLOURS))[: self._descriptions].tolist():
                yield _DESCRIBE.format(COLOURS[i]), _place(objects[i])
        if self._closest_objects:
            closest, _ = extremes(objects, np.ones((len(objects), len(objects)), bool))
            for i in rng.permutation(len(COLOURS))[: self._closest_objects].tolist():
                yield _DESCRIBE_CLOSEST.format(COLOURS[i]), _named(objects, int(closest[i]))

    def _draw(
        self, objects: Int[np.ndarray, "n 3"], visible: Sequence[int], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "75 75 3"]:
        return draw(objects, visible)

    def text_lengths(self, view: str, tokenizer: AnyTokenizer) -> tuple[int, int]:
        shown = VIEWS[view].text
        if shown is None:
            return 0, 0
        count = len(range(*shown.indices(len(COLOURS))))
        sentences = [f"{place} ." for place in _named_places()]
        # Byte-level BPE never merges across a space, so the lengths of the sentences add up.
        first = [len(tokenizer.encode(sentence)) for sentence in sentences]
        later = [len(tokenizer.encode(f" {sentence}")) for sentence in sentences]
        return min(first) + (count - 1) * min(later), max(first) + (count - 1) * max(later)

    def streams(self, view: str) -> tuple[str, ...]:
        return VIEWS[view].streams

    def complete(self, view: str) -> bool:
        return True

    def paired(self, view: str) -> bool:
        parts = VIEWS[view]
        return parts.text is not None and parts.text == parts.image

    def question_length(self, tokenizer: AnyTokenizer) -> int:
        prompts = [prompt for kinds in _PROMPTS for kind in kinds for prompt in kind]
        kinds: list[tuple[list[str], list[str]]] = [(prompts, [*ANSWERS])]
        if self._descriptions:
            kinds.append(([_DESCRIBE.format(c) for c in COLOURS], _places()))
        if self._closest_objects:
            kinds.append(([_DESCRIBE_CLOSEST.format(c) for c in COLOURS], _named_places()))
        return max(_longest(tokenizer, asked) + _longest(tokenizer, said) for asked, said in kinds)

    def answer_length(self, tokenizer: AnyTokenizer) -> int:
        places = _places() if self._descriptions else []
        named = _named_places() if self._closest_objects else []
        return _longest(tokenizer, [*ANSWERS, *places, *named])

    def corpus(self) -> Iterator[str]:
        for i, scene in self._sample():
            example = self.render(scene, "text", np.random.default_rng((0, i)))
            yield from (example.text or "", *example.prompts, *example.answers)

    def answers(self) -> Iterator[str]:
        return (answer for _, scene in self._sample() for answer in scene.answer_texts)

    def _sample(self) -> Iterator[tuple[int, Scene]]:
        for i in range(min(len(self), _CORPUS_SCENES)):
            with contextlib.suppress(DamagedRecord):
                yield i, self[i]


def _places() -> list[str]:
    """For each shape and number, the description of an object that is as long as any of them."""
    return [f"{shape} at {n} {n}" for shape in SHAPES for n in range(RADIUS, SIZE - RADIUS)]


def _named_places() -> list[str]:
    """The same with each colour before it."""
    return [f"{colour} {place}" for colour in COLOURS for place in _places()]


def _longest(tokenizer: AnyTokenizer, texts: Iterable[str]) -> int:
    """The largest number of tokens of one of these texts."""
    return max(len(tokenizer.encode(text)) for text in texts)
