"""Test scenes of Sort-of-CLEVR that are in no split, also shifted ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from slam_jax.data.scenes import Scenes
from slam_jax.data.sort_of_clevr import answer_table, draw, make_scene

_FIRST = 10_000  # the splits have the scenes before it


class _Records(Sequence[Any]):
    def __init__(self, count: int, num_objects: int):
        self._count, self._num_objects = count, num_objects

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        objects, questions = make_scene(_FIRST + range(self._count)[index], self._num_objects)
        colour, kind, subtype = questions.T
        answers = answer_table(objects)[kind, colour, subtype]
        return {"objects": objects, "questions": questions, "answers": answers}


class FreshScenes(Scenes):
    """`count` scenes as a `Source`, the same on every machine.

    noise: standard deviation of Gaussian noise that is added to each pixel (of 0 to 255).
    num_objects: 8 adds two objects in colours that training never shows. They are in the picture
    alone, and count for the answers; no question names them.
    """

    def __init__(self, count: int, *, noise: float = 0.0, num_objects: int = 6):
        super().__init__(_Records(count, num_objects))
        self._noise, self._extra = noise, range(6, num_objects)

    def _draw(
        self, objects: Int[np.ndarray, "n 3"], visible: Sequence[int], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "75 75 3"]:
        image = draw(objects, (*visible, *self._extra))
        noise = rng.normal(0.0, self._noise, image.shape) if self._noise else 0.0
        return np.clip(image + noise, 0, 255).astype(np.uint8)
