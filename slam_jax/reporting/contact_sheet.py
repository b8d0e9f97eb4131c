"""A contact sheet: pictures in a grid, each below its prompt and above its answer."""

import functools
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.transforms import Bbox, TransformedBbox

from slam_jax.errors import shorten

COLUMNS, SIDE = 6, 1.68
_GAP, _MARGIN, _LINE = 0.16, 0.24, 0.135
_FONT, _MISSING = "DejaVu Sans", "\N{REPLACEMENT CHARACTER}"
_STYLE: Any = {
    "font.family": _FONT,
    "font.size": 8,
    "text.parse_math": False,  # what users wrote is never TeX
    "axes.edgecolor": "#cfcfca",
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "xaxis.labellocation": "left",
}


class Tile(NamedTuple):
    image: UInt8[np.ndarray, "H W 3"]
    prompt: str
    answer: str


def contact_sheet(tiles: Sequence[Tile], title: str) -> Figure:
    """A figure with `COLUMNS` pictures in a row, each `SIDE` inches high and wide.

    Texts of more than three lines end in dots. Characters that DejaVu Sans lacks, the font that
    Matplotlib brings along, are drawn as a replacement character, which a footnote then explains.
    Raises ValueError if there are no tiles.
    """
    if not tiles:
        raise ValueError("no pictures for a contact sheet; give at least one")
    prompts = [_lines(tile.prompt) for tile in tiles]
    answers = [_lines(tile.answer) for tile in tiles]
    above, below = (_LINE * (1 + max(map(len, texts))) for texts in (prompts, answers))
    num_rows = -(-len(tiles) // COLUMNS)
    width = 2 * _MARGIN + COLUMNS * (SIDE + _GAP) - _GAP
    header, footer = 2 * _MARGIN + above, _MARGIN + below
    space = above + below + _GAP
    height = header + num_rows * (SIDE + space) - space + footer
    grid = dict(left=_MARGIN / width, right=1 - _MARGIN / width, wspace=_GAP / SIDE)
    grid |= dict(bottom=footer / height, top=1 - header / height, hspace=space / SIDE)
    with matplotlib.rc_context(_STYLE):
        figure = Figure((width, height), dpi=100, facecolor="#f7f7f5")
        figure.text(_MARGIN / width, 1 - _MARGIN / height, shorten(_drawable(title), 110), size=11)
        axes = figure.subplots(num_rows, COLUMNS, squeeze=False, gridspec_kw=grid)
        for place in axes.flat[len(tiles) :]:
            place.remove()
        for place, tile, prompt, answer in zip(axes.flat, tiles, prompts, answers, strict=False):
            place.set(xticks=[], yticks=[])
            place.imshow(tile.image)
            column = TransformedBbox(Bbox([[0, -9], [1 + _GAP / SIDE, 9]]), place.transAxes)
            for text in (
                place.set_title("\n".join(prompt), color="#66665f"),
                place.set_xlabel("\n".join(answer)),
            ):
                text.set(clip_box=column, clip_on=True)
        if any(_MISSING in "".join(text) for text in (*prompts, *answers, _drawable(title))):
            note = f"{_MISSING} a character that the font {_FONT} lacks"
            figure.text(_MARGIN / width, 0.06 / height, note, color="#66665f")
    return figure


def _lines(text: str) -> list[str]:
    return textwrap.wrap(_drawable(text), 24, max_lines=3, placeholder="...")


def _drawable(text: str) -> str:
    """The text with every character that the font lacks replaced; blanks stay."""
    return "".join(c if c.isspace() or ord(c) in _characters() else _MISSING for c in text)


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(_FONT)).get_charmap())
