"""From what stands on the page to a request and the rules of its answer."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from slam_jax.errors import InputError, shorten
from slam_jax.generation import Request, Sampling
from slam_jax.training import Loaded


def column_names(loaded: Loaded) -> list[str]:
    """Over the table of auxiliary vectors: the names of their numbers, or x1, x2, .."""
    if loaded.aux_format is not None:
        return list(loaded.aux_format.names)
    return [f"x{i + 1}" for i in range(loaded.model.config.aux_dim)]


def has_columns(loaded: Loaded) -> bool:
    """Whether the table is one row, of a number for each column of the data."""
    return loaded.aux_format is not None and loaded.aux_format.has_columns


def read_request(
    loaded: Loaded,
    image: str | None,
    text: str | None,
    rows: Sequence[Sequence[Any]],
    prompt: str | None,
    seed: Any,
) -> Request:
    """Raises InputError for what is no table of numbers, or no whole seed."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed is {seed!r}; expected a whole number")
    aux = read_aux(rows, column_names(loaded), one_row=has_columns(loaded))
    return Request(prompt or "", text or None, image, aux, seed)


def read_sampling(
    max_new_tokens: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    repetition_penalty: Any,
) -> Sampling:
    """A number field of the page cannot be blank from the start: 0 stands for no top-k.

    Raises InputError, naming the field, for what cannot be used.
    """
    return Sampling(max_new_tokens, temperature, top_k or None, top_p, min_p, repetition_penalty)


def read_aux(
    rows: Sequence[Sequence[Any]], names: Sequence[str], *, one_row: bool
) -> list[Any] | None:
    """Rows of numbers, or the one row; blank cells are None.

    Blank rows are left out; None where there is no other. Raises InputError, naming the cell, for
    what is no number, and for a second row where there is to be one.
    """
    read = [
        [_number(cell, f"row {i + 1}, {name}") for cell, name in _named(cells, names)]
        for i, cells in enumerate(rows)
    ]
    filled = [row for row in read if any(number is not None for number in row)]
    if not filled:
        return None
    if not one_row:
        return filled
    if len(filled) > 1:
        raise InputError(f"aux has {len(filled)} rows; expected one")
    return filled[0]


def _named(cells: Sequence[Any], names: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Columns can be added on the page; the model then says how many it expects."""
    further = map("column {}".format, itertools.count(len(names) + 1))
    return zip(cells, itertools.chain(names, further), strict=False)


def _number(cell: Any, where: str) -> float | None:
    text = "" if cell is None else str(cell).strip()
    try:
        number = float(text) if text else None
    except ValueError:
        raise InputError(f"aux, {where}: {shorten(text, 30)!r} is no number") from None
    return None if number is None or math.isnan(number) else number
