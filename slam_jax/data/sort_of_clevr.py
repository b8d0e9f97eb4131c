"""Sort-of-CLEVR: six coloured shapes on a 75x75 image and twenty questions about them.

The data set is generated. Source: Santoro et al. 2017, "A simple neural network module for
relational reasoning" (arXiv 1706.01427). Two differences from the published generator make every
answer unique: bounding boxes never overlap, and no object has two others at the same distance.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Int, UInt8
from PIL import Image

SIZE = 75
RADIUS = 5
COLOURS = ("red", "green", "blue", "orange", "gray", "yellow")
SHAPES = ("circle", "square")
KINDS = ("non_relational", "relational")
# 7 and 8 are answers in shifted test scenes alone.
ANSWERS = ("circle", "square", "yes", "no", "1", "2", "3", "4", "5", "6", "7", "8")
PROMPTS = (
    ("shape of {}", "left half: {}", "top half: {}"),
    ("shape closest to {}", "shape furthest from {}", "how many like {}"),
)
QUESTIONS_PER_KIND = 10

_COLOURS = "ff0000 00ff00 0000ff ff9c00 808080 ffff00 000000 00ffff"  # as COLOURS, then two more
_RGB = np.array([tuple(bytes.fromhex(colour)) for colour in _COLOURS.split()], np.uint8)
_SEED = 1706_01427
_OFFSET = np.arange(-RADIUS, RADIUS + 1)
_CIRCLE = _OFFSET[:, None] ** 2 + _OFFSET**2 <= (RADIUS + 0.5) ** 2
_STAMPS = np.stack([_CIRCLE, np.ones_like(_CIRCLE)])


def draw(objects: Int[np.ndarray, "n 3"], visible: Iterable[int]) -> UInt8[np.ndarray, "75 75 3"]:
    """Draws the objects whose colour index is in `visible` on a white image.

    Objects 6 and 7, which only shifted test scenes have, are black and cyan.
    """
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for colour in visible:
        shape, x, y = objects[colour].tolist()
        window = image[y - RADIUS : y + RADIUS + 1, x - RADIUS : x + RADIUS + 1]
        window[_STAMPS[shape]] = _RGB[colour]
    return image


def answer_table(
    objects: Int[np.ndarray, "n 3"], visible: Bool[np.ndarray, "n n"] | None = None
) -> Int[np.ndarray, "2 n 3"]:
    """Answers to all questions as indices into ANSWERS, by [kind, named colour, subtype].

    Non-relational answers depend on the named object alone. Distances are between centres.

    Args:
      objects: per colour its shape (index into SHAPES) and its centre x, y in pixels.
      visible: whether a question about object i may use object j; None = all objects. Row i must
        contain i itself and at least one other object.
    """
    shape, centre = objects[:, 0], objects[:, 1:]
    if visible is None:
        visible = np.ones((len(objects), len(objects)), bool)
    closest, furthest = extremes(objects, visible)
    alike = (visible & (shape[:, None] == shape)).sum(1)
    left, top = (np.where(centre < SIZE / 2, 2, 3)).T
    of_one = np.stack([shape, left, top], -1)
    of_several = np.stack([shape[closest], shape[furthest], 3 + alike], -1)
    return np.stack([of_one, of_several])


def extremes(
    objects: Int[np.ndarray, "n 3"], visible: Bool[np.ndarray, "n n"]
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """For each object, the index of the closest and of the furthest other one that it may use."""
    others = visible & ~np.eye(len(objects), dtype=bool)
    centre = objects[:, 1:]
    distance = ((centre[:, None] - centre) ** 2).sum(-1)
    closest = np.where(others, distance, np.iinfo(distance.dtype).max).argmin(1)
    return closest, np.where(others, distance, -1).argmax(1)


def needs_both(
    objects: Int[np.ndarray, "6 3"],
    questions: Int[np.ndarray, "Q 3"],
    answers: Int[np.ndarray, "Q"],
    first_half: Sequence[int],
) -> Bool[np.ndarray, "Q"]:
    """Whether each answer needs both halves of a scene: `first_half` and the other three objects.

    It does if the answer computed from the half with the named object is wrong. This is never so
    for a non-relational question, nor for a relational one that happens to have the same answer.
    """
    in_first = np.zeros(6, bool)
    in_first[list(first_half)] = True
    from_half = answer_table(objects, in_first[:, None] == in_first)
    colour, kind, subtype = questions.T
    return from_half[kind, colour, subtype] != answers


def make_scene(
    index: int, num_objects: int = 6
) -> tuple[Int[np.ndarray, "n 3"], Int[np.ndarray, "20 3"]]:
    """Returns objects and questions of scene `index`; a question is (colour, kind, subtype).

    num_objects: 6, or up to 8 for a shifted test; questions are about the first six.
    """
    rng = np.random.default_rng((_SEED, index))
    centre = _make_centres(rng, num_objects)
    objects = np.concatenate([rng.integers(2, size=(num_objects, 1)), centre], -1)
    count = 2 * QUESTIONS_PER_KIND
    kind = np.arange(count) // QUESTIONS_PER_KIND
    questions = np.stack([rng.integers(6, size=count), kind, rng.integers(3, size=count)], -1)
    return objects, questions


def _make_centres(rng: np.random.Generator, count: int) -> Int[np.ndarray, "count 2"]:
    while True:
        centres: list[tuple[int, int]] = []
        for x, y in rng.integers(RADIUS, SIZE - RADIUS, size=(60, 2)).tolist():
            if all(max(abs(x - u), abs(y - v)) > 2 * RADIUS for u, v in centres):
                centres.append((x, y))
            if len(centres) == count:
                break
        else:
            continue
        distances = [{(x - u) ** 2 + (y - v) ** 2 for u, v in centres} for x, y in centres]
        if all(len(one) == count for one in distances):
            return np.array(centres)


@dataclasses.dataclass
class SortOfClevrConfig(tfds.core.BuilderConfig):
    """Number of scenes in each split."""

    train: int = 9300
    validation: int = 500
    test: int = 200


class SortOfClevr(tfds.core.GeneratorBasedBuilder):
    """Sort-of-CLEVR as a TFDS data set with the configs `full` (10,000 scenes) and `tiny`.

    `validation` is taken from the 9,800 published training scenes. Features: `index` (of the scene
    over all splits), `image` (PNG), `objects` [6, 3] and `questions` [20, 3] as in `make_scene`,
    `answers` [20] as indices into ANSWERS. Pixels and numbers are the same on every machine; PNG
    compression may differ.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        SortOfClevrConfig(name="full"),
        SortOfClevrConfig(name="tiny", train=256, validation=32, test=32),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        count = 2 * QUESTIONS_PER_KIND
        shapes = {"index": (), "objects": (6, 3), "questions": (count, 3), "answers": (count,)}
        features: dict[str, Any] = {
            name: tfds.features.Tensor(shape=shape, dtype=np.int32)
            for name, shape in shapes.items()
        }
        features["image"] = tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Six coloured shapes on a 75x75 image and twenty questions about them.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://arxiv.org/abs/1706.01427",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        firsts = {"train": 0, "validation": 9300, "test": 9800}
        return {
            split: self._generate_examples(first, getattr(self.builder_config, split))
            for split, first in firsts.items()
        }

    def _generate_examples(self, first: int, count: int) -> Iterator[tuple[int, dict]]:
        for index in range(first, first + count):
            objects, questions = make_scene(index)
            colour, kind, subtype = questions.T
            png = io.BytesIO()
            Image.fromarray(draw(objects, range(6))).save(png, "png")
            arrays = {
                "index": np.array(index),
                "objects": objects,
                "questions": questions,
                "answers": answer_table(objects)[kind, colour, subtype],
            }
            record = {name: array.astype(np.int32) for name, array in arrays.items()}
            yield index, record | {"image": png.getvalue()}
