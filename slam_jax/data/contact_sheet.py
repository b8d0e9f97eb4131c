"""Many small pictures on one, each with a question and its answer below."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

COLUMNS, SIDE = 6, 168
_GAP, _MARGIN, _LINE, _HEADER = 16, 24, 18, 40
_MOST_LINES = 3
_PAPER, _FRAME, _TITLE, _PROMPT, _ANSWER = "#f7f7f5", "#cfcfca", "#333333", "#77776f", "#111111"


class Tile(NamedTuple):
    image: UInt8[np.ndarray, "H W 3"]
    prompt: str
    answer: str


def contact_sheet(tiles: Sequence[Tile], title: str) -> Image.Image:
    """Pictures of `SIDE` pixels a side, `COLUMNS` in a row, as high as their texts need.

    Small pictures keep their pixels, larger ones are scaled smoothly; texts over three lines end
    in dots. Raises ValueError without tiles.
    """
    if not tiles:
        raise ValueError("no pictures for a contact sheet; give at least one")
    fonts = [ImageFont.load_default(size) for size in (17, 13, 14)]
    texts = [(_wrap(tile.prompt, fonts[1]), _wrap(tile.answer, fonts[2])) for tile in tiles]
    row_height = SIDE + 6 + max(len(prompt) + len(answer) for prompt, answer in texts) * _LINE
    rows = -(-len(tiles) // COLUMNS)
    width = 2 * _MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * _GAP
    height = 2 * _MARGIN + _HEADER + rows * row_height + (rows - 1) * _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    [shown] = _wrap(title, fonts[0], width - 2 * _MARGIN, most=1) or [""]
    draw.text((_MARGIN, _MARGIN - 4), shown, _TITLE, fonts[0])
    for i, (tile, (prompt, answer)) in enumerate(zip(tiles, texts, strict=True)):
        x = _MARGIN + i % COLUMNS * (SIDE + _GAP)
        y = _MARGIN + _HEADER + i // COLUMNS * (row_height + _GAP)
        picture = _scaled(tile.image)
        left, top = x + (SIDE - picture.width) // 2, y + (SIDE - picture.height) // 2
        sheet.paste(picture, (left, top))
        box = (left - 1, top - 1, left + picture.width, top + picture.height)
        draw.rectangle(box, outline=_FRAME)
        y += SIDE + 6
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
    if longest <= SIDE // 3:
        times = SIDE // longest
        size = (image.width * times, image.height * times)
        return image.resize(size, Image.Resampling.NEAREST)
    size = (max(1, image.width * SIDE // longest), max(1, image.height * SIDE // longest))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: int = SIDE, most: int = _MOST_LINES) -> list[str]:
    """Lines no wider than `width`, broken between words, or within those that are too wide."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        while font.getlength(longer) > width and len(longer) > 1:
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
