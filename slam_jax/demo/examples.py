"""Scenes of the test split, and prompts about them, for models trained on Sort-of-CLEVR."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from slam_jax.data import sort_of_clevr
from slam_jax.data.config import DataConfig
from slam_jax.data.scenes import describe, tabulate
from slam_jax.data.sort_of_clevr import COLOURS, draw, make_scene
from slam_jax.data.views import VIEWS

SCENES = range(9_800, 9_806)
"""The first of the test split."""

PROMPTS = tuple(
    prompt.format(colour)
    for prompt, colour in zip(sum(sort_of_clevr.PROMPTS, ()), COLOURS, strict=True)
)
"""One prompt of every kind, each about another colour."""


class Shown(NamedTuple):
    """The inputs of the page for a scene; a part that the view lacks is None, "" or []."""

    image: UInt8[np.ndarray, "75 75 3"] | None
    text: str
    aux: list[list[float]]


def trained_views(config: Mapping[str, Any]) -> dict[str, str]:
    """The views a run was trained on, by their names on the page; {} for other data sets."""
    if config["data"]["name"].partition("/")[0] != "sort_of_clevr":
        return {}
    return {_name(view): view for view in DataConfig(**config["data"]).views}


def show(scene: int, view: str) -> Shown:
    """A scene in the parts that the view has."""
    objects, _ = make_scene(scene)
    order, parts = list(range(len(COLOURS))), VIEWS[view]
    rows = [] if parts.aux is None else tabulate(objects, order[parts.aux]).tolist()
    return Shown(
        image=None if parts.image is None else draw(objects, order[parts.image]),
        text="" if parts.text is None else describe(objects, order[parts.text]),
        aux=[[round(number, 3) for number in row] for row in rows],
    )


def _name(view: str) -> str:
    """Such as "image only", "image and text", or "half image, half text"."""
    streams = VIEWS[view].streams
    if VIEWS[view].split:
        return ", ".join(f"half {stream}" for stream in streams)
    return " and ".join(streams) + " only" * (len(streams) == 1)
