"""Views: which part of an example each input stream shows.

Only scenes of six objects can be split; other data sets show a stream whole or not at all.
"""

from typing import NamedTuple

ALL, FIRST, SECOND = slice(0, 6), slice(0, 3), slice(3, 6)


class View(NamedTuple):
    """The objects (of six in random order) that each input shows; None = the input is absent."""

    image: slice | None = None
    text: slice | None = None
    aux: slice | None = None

    @property
    def split(self) -> bool:
        """Whether each input shows only some of the objects."""
        return ALL not in self

    @property
    def streams(self) -> tuple[str, ...]:
        """The inputs that the view has."""
        return tuple(name for name, part in self._asdict().items() if part is not None)


TRAINING_VIEWS = {
    "image": View(image=ALL),
    "text": View(text=ALL),
    "aux": View(aux=ALL),
    "image_text": View(image=ALL, text=ALL),
    "image_aux": View(image=ALL, aux=ALL),
    "text_aux": View(text=ALL, aux=ALL),
    "all": View(image=ALL, text=ALL, aux=ALL),
    "split_image_text": View(image=FIRST, text=SECOND),
    "split_image_aux": View(image=FIRST, aux=SECOND),
    "split_text_aux": View(text=FIRST, aux=SECOND),
}

HALF_VIEWS = {
    f"{name}_only_{stream}": View(**{stream: getattr(view, stream)})
    for name, view in TRAINING_VIEWS.items()
    for stream in view.streams
    if view.split
}

VIEWS = TRAINING_VIEWS | HALF_VIEWS


def with_halves(views: tuple[str, ...]) -> tuple[str, ...]:
    """The views, followed by the halves of those that are split."""
    return views + tuple(half for half in HALF_VIEWS if half.partition("_only_")[0] in views)
