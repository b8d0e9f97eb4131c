"""The metrics of an evaluation as a table on the terminal and as a JSON file."""

import json
import os
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from slam_jax.errors import shorten, write_whole

_DIRECTIONS = ("text_to_image", "image_to_text")
_RECALLS = ("recall@1", "recall@5")
_LABELS = {"non_relational": "non-relational", "needs_both": "needs both"}


def print_metrics(metrics: Mapping[str, Any], file: Any = None) -> None:
    """Prints accuracies with 95% intervals by view and kind of question, then retrieval.

    With rules and colours on a terminal, as plain columns elsewhere. `file` is a text file,
    standard output by default.
    """
    # Kinds and answers are text of users: never markup, emoji codes or numbers to highlight.
    plain: Any = dict(file=file, markup=False, emoji=False, highlight=False)
    console = Console(**plain)
    if not console.is_terminal:
        console = Console(**plain, width=100, color_system=None)
    style = box.SIMPLE_HEAD if console.is_terminal else None

    baseline = metrics.get("baseline_answer")
    table = Table("view", "questions", box=style, title=f"step {metrics['step']:,}")
    table.title_justify = "left"
    for column in ("right", "95% interval", "n", *(["baseline"] if baseline else [])):
        table.add_column(column, justify="right")
    for view, entries in metrics["views"].items():
        for i, (entry, row) in enumerate(entries.items()):
            interval = f"{percent(row['low'])} to {percent(row['high'])}"
            cells = [percent(row["accuracy"]), interval, f"{row['n']:,}"]
            cells += [percent(row["baseline"])] if baseline else []
            table.add_row(view if i == 0 else "", entry_label(entry), *cells)
        table.add_section()
    console.print(table)
    if baseline:
        console.print(f"baseline: {explain_baseline(metrics)}")

    if retrieval := metrics.get("retrieval"):
        table = Table(f"retrieval among {retrieval['n']:,} scenes", box=style)
        for column in _RECALLS:
            table.add_column(column, justify="right")
        for direction in _DIRECTIONS:
            recalls = (percent(retrieval[direction][column]) for column in _RECALLS)
            table.add_row(direction.replace("_", " "), *recalls)
        console.print()
        console.print(table)


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes the metrics as JSON, all or nothing: a reader never sees half a file.

    Raises:
      ValueError: a value is NaN or infinite, which JSON cannot hold.
      WriteError: the file cannot be written; an older file is kept.
    """
    write_whole(path, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def explain_baseline(metrics: Mapping[str, Any]) -> str:
    """What the baseline is, in one sentence."""
    answer = shorten(metrics["baseline_answer"], 60)
    return f'always answering "{answer}", the most frequent answer of the training split'


def entry_label(entry: str) -> str:
    """The name of a row: needs_both_image_only -> "  image only", indented below "needs both"."""
    if entry.startswith("needs_both_"):
        return "  " + entry.removeprefix("needs_both_").replace("_", " ")
    return shorten(_LABELS.get(entry, entry), 60)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"
