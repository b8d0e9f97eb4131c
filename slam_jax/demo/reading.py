"""From the inputs of the page to a request."""

import math
from collections.abc import Sequence
from typing import Any

from slam_jax.errors import InputError, shorten
from slam_jax.generation import Request
from slam_jax.training import Loaded


def column_names(loaded: Loaded) -> list[str]:
    """The column names of the table of auxiliary vectors, or x1, x2, .. where they have none."""
    if loaded.aux_format is not None:
        return list(loaded.aux_format.names)
    return [f"x{i + 1}" for i in range(loaded.model.config.aux_dim)]


def has_columns(loaded: Loaded) -> bool:
    """Whether the table has one row, with a number for each column of the data."""
    return loaded.aux_format is not None and loaded.aux_format.has_columns


def read_request(
    loaded: Loaded,
    image: str | None,
    text: str | None,
    rows: Sequence[Sequence[Any]],
    prompt: str | None,
    seed: Any,
) -> Request:
    """Raises InputError for a table with other things than numbers, and for a seed that is not a
    whole number."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed is {seed!r}; expected a whole number")
    aux = read_aux(rows, column_names(loaded), one_row=has_columns(loaded))
    return Request(prompt or "", text or None, image, aux, seed)


def read_aux(
    rows: Sequence[Sequence[Any]], names: Sequence[str], *, one_row: bool
) -> list[Any] | None:
    """Rows of numbers, or one row where `one_row`; blank cells become None.

    Blank rows are left out; None where all are blank. Raises InputError, naming the cell, for a
    cell that is not a number, and for several rows where one is expected.
    """
    read = []
    for i, cells in enumerate(rows):
        # The visitor may add columns; the model then says how many it expects.
        more = [f"column {j + 1}" for j in range(len(names), len(cells))]
        named = zip(cells, [*names, *more], strict=False)
        read.append([_number(cell, f"row {i + 1}, {name}") for cell, name in named])
    filled = [row for row in read if any(number is not None for number in row)]
    if one_row and len(filled) > 1:
        raise InputError(f"aux has {len(filled)} rows; expected one")
    if not filled:
        return None
    return filled[0] if one_row else filled


def _number(cell: Any, where: str) -> float | None:
    text = "" if cell is None else str(cell).strip()
    try:
        number = float(text) if text else None
    except ValueError:
        raise InputError(f"aux, {where}: {shorten(text, 30)!r} is no number") from None
    return None if number is None or math.isnan(number) else number
