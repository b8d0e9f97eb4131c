"""Views: which part of an example each input stream shows."""

from typing import NamedTuple

ALL, FIRST, SECOND = slice(0, 6), slice(0, 3), slice(3, 6)


class View(NamedTuple):
    """Which objects of a scene in random order each rendering shows; None = no such rendering."""

    image: slice | None = None
    text: slice | None = None
    aux: slice | None = None

    @property
    def split(self) -> bool:
        """Whether objects are missing from a rendering."""
        return ALL not in self


TRAINING_VIEWS = {
    "image": View(image=ALL),
    "text": View(text=ALL),
    "aux": View(aux=ALL),
    "image_text": View(image=ALL, text=ALL),
    "split_image_text": View(image=FIRST, text=SECOND),
    "split_image_aux": View(image=FIRST, aux=SECOND),
}

HALF_VIEWS = {
    "split_image_text_only_image": View(image=FIRST),
    "split_image_text_only_text": View(text=SECOND),
    "split_image_aux_only_image": View(image=FIRST),
    "split_image_aux_only_aux": View(aux=SECOND),
}

VIEWS = TRAINING_VIEWS | HALF_VIEWS
