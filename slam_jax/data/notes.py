"""Notes: what a user should know about a data set, one line each.

`inspect`, training and the report of an evaluation show them.
"""

import difflib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from slam_jax.data.columns import Columns
from slam_jax.data.numbers import find_outliers
from slam_jax.data.splits import Divided
from slam_jax.data.tables import COLUMNS, quote

_MOST_NAMED = 8


def table_notes(
    columns: Columns, divided: Divided, cleaned: Sequence[int], *, compared: bool
) -> Iterator[str]:
    """Notes about a data set. cleaned: the lines whose answer or kind was changed when it was read.
    compared: whether pictures were compared by their content."""
    free = [column for column in COLUMNS if column not in columns.present]
    aliases = {alias: column for column in free for alias in (column, *COLUMNS[column])}
    parts = []
    for name, first in list(columns.unused.items())[:_MOST_NAMED]:
        if first is None:
            parts.append(f"{quote(name)} (numbers)")
            continue
        line, value = first
        plain = re.sub(r"[\W_]", "", name.lower())
        similar = difflib.get_close_matches(plain, free, n=1, cutoff=0.75) or [None]
        near = aliases.get(plain, similar[0])
        hint = f"; did you mean {near!r}?" if near else ""
        parts.append(f"{quote(name)} (row {line}: {quote(value)} is no number{hint})")
    if more := len(columns.unused) - len(parts):
        parts.append(f"and {more} more")
    if parts:
        yield f"columns that are not used: {', '.join(parts)}"
    if shared := divided.shared:
        what = "pictures or texts" if compared else "keys or texts"
        yield (
            f"{what} that are in more than one split: {len(shared):,} (first in row "
            f"{min(shared)}); scores on them are too good, so give all rows of one the same split"
        )
    if cleaned:
        yield (
            "answers and kinds whose outer spaces were removed or whose accents were composed "
            f"(Unicode NFC): {len(cleaned):,} (first in row {cleaned[0]})"
        )


def outlier_notes(
    columns: Sequence[str], numbers: Float[np.ndarray, "n A"], lines: Sequence[int], robust: bool
) -> Iterator[str]:
    """A note for each column with outliers among the training numbers, which are in `lines`.

    robust: mean and scale are computed without outliers.
    """
    effect = "left out of mean and scale" if robust else "the other numbers hardly differ for it"
    for name, column in zip(columns, numbers.T, strict=True):
        (places,) = np.nonzero(find_outliers(column))
        if len(places):
            yield (
                f"column {name!r}: {len(places):,} of {len(column):,} training numbers far from "
                f"the others, {effect} (first in row {lines[places[0]]}: {column[places[0]]:.6g})"
            )
