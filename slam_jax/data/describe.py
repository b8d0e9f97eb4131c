"""What a data set holds, in lines that training prints at its start."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slam_jax.data.config import DataConfig
from slam_jax.data.folder import Table
from slam_jax.data.splits import SPLITS
from slam_jax.errors import shorten

if TYPE_CHECKING:
    from slam_jax.data.parts import Dataset


def describe(dataset: "Dataset", config: DataConfig) -> list[str]:
    """Lines for a user: the format, the columns used and left out, the rows by split, and how many
    pictures or texts are in more than one split."""
    if not dataset.tables:
        return [f"data: {config.name}; {_rows(dataset)}"]
    lines = [line for table in dataset.tables for line in _describe_table(table)]
    if not config.mixture:
        return [f"{lines[0]}; {_rows(dataset)}", *lines[1:]]
    weights = ", ".join(f"{Path(place).name} {weight:g}" for place, weight in config.mixture)
    return [*lines, f"mixture, by weight: {weights}; {_rows(dataset)}"]


def _rows(dataset: "Dataset") -> str:
    return ", ".join(f"{len(getattr(dataset, split)):,} rows for {split}" for split in SPLITS)


def _describe_table(table: Table) -> Iterator[str]:
    yield f"data: {table.format} {table.path}"
    used = [name if name == ours else f"{ours} = {name!r}" for ours, name in table.read.items()]
    numbers = f"; numbers {_names(table.columns)}" if table.columns else ""
    left_out = f"; not used: {_names(table.ignored)}" if table.ignored else ""
    yield f"read: {', '.join(used)}{numbers}{left_out}"
    if table.made:
        yield f"{' and '.join(table.made)}: made of rows of train, as there were none"
    what = "pictures or texts"
    if not table.compared:
        yield f"{what} were not compared, which would read all of them; keys decide on splits"
    else:
        yield f"{what} in more than one split: {table.shared:,}"


def _names(names: Sequence[str]) -> str:
    return shorten(", ".join(map(repr, names)), 200)
