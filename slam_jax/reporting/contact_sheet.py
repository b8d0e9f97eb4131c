"""Many small pictures on one, each with a question and its answer below."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

COLUMNS, SIDE = 6, 168
_GAP, _MARGIN, _SPACE, _LINE, _HEADER = 16, 24, 6, 18, 40
_MOST_LINES, _FEW_PIXELS = 3, 32
_PAPER, _FRAME, _TITLE, _PROMPT, _ANSWER = "#f7f7f5", "#cfcfca", "#333333", "#77776f", "#111111"


class Tile(NamedTuple):
    image: UInt8[np.ndarray, "H W 3"]
    prompt: str
    answer: str


def contact_sheet(tiles: Sequence[Tile], title: str) -> Image.Image:
    """Pictures of `SIDE` pixels a side, `COLUMNS` in a row, each row as high as its texts need.

    Of small pictures the pixels can be seen, larger ones are scaled smoothly; texts of more than
    three lines end in dots. Raises ValueError without tiles.
    """
    if not tiles:
        raise ValueError("no pictures for a contact sheet; give at least one")
    fonts = [ImageFont.load_default(size) for size in (17, 13, 14)]
    texts = [(_wrap(tile.prompt, fonts[1]), _wrap(tile.answer, fonts[2])) for tile in tiles]
    lines = [len(prompt) + len(answer) for prompt, answer in texts]
    starts = range(0, len(tiles), COLUMNS)
    heights = [SIDE + _SPACE + max(lines[i : i + COLUMNS]) * _LINE for i in starts]
    width = 2 * _MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * _GAP
    height = 2 * _MARGIN + _HEADER + sum(heights) + (len(heights) - 1) * _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    [shown] = _wrap(title, fonts[0], float(width - 2 * _MARGIN), most=1) or [""]
    draw.text((_MARGIN, _MARGIN - 4), shown, _TITLE, fonts[0])
    for i, (tile, (prompt, answer)) in enumerate(zip(tiles, texts, strict=True)):
        row, column = divmod(i, COLUMNS)
        x = _MARGIN + column * (SIDE + _GAP)
        y = _MARGIN + _HEADER + sum(heights[:row]) + row * _GAP
        picture = _scaled(tile.image)
        sheet.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_FRAME)
        y += SIDE + _SPACE
        for line in prompt:
            draw.text((x, y), line, _PROMPT, fonts[1])
            y += _LINE
        for line in answer:
            draw.text((x, y), line, _ANSWER, fonts[2])
            y += _LINE
    return sheet


def _scaled(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    longest = max(image.size)
    size = (max(1, image.width * SIDE // longest), max(1, image.height * SIDE // longest))
    few = longest <= _FEW_PIXELS
    return image.resize(size, Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: float = float(SIDE), most: int = _MOST_LINES) -> list[str]:
    """Lines no wider than `width`, broken between words, or within those that are too wide."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        while len(lines) <= most and len(longer) > 1 and font.getlength(longer) > width:
            fitting = _fitting(longer, font, width)
            lines.append(longer[:fitting])
            longer = longer[fitting:]
        line = longer
        if len(lines) > most:
            break
    lines += [line] if line else []
    if len(lines) > most:
        last = lines[most - 1]
        kept = _fitting(last, font, width - font.getlength("..."))
        lines = [*lines[: most - 1], last[:kept] + "..."]
    return lines


def _fitting(text: str, font: Any, width: float) -> int:
    """How many letters of `text` fit, at least one."""
    count = 1
    while count < len(text) and font.getlength(text[: count + 1]) <= width:
        count += 1
    return count
