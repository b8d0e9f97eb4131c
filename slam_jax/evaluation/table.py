"""The figures as a table for people and as a file for programs."""

import json
import os
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from slam_jax.errors import write_whole


def print_metrics(metrics: Mapping[str, Any], file: Any = None) -> None:
    """Prints accuracies by view and kind of question with 95% intervals, then retrieval.

    On a terminal with rules and colours, elsewhere as plain ASCII columns. `file` is open for text,
    standard output by default.
    """
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=100, color_system=None)
    style = box.SIMPLE_HEAD if console.is_terminal else None

    table = Table(
        "view", "questions", box=style, title=f"step {metrics['step']:,}", title_justify="left"
    )
    for column in ("right", "95% interval", "n"):
        table.add_column(column, justify="right")
    for view, entries in metrics["views"].items():
        for i, (entry, figures) in enumerate(entries.items()):
            low, high = _percent(figures["low"]), _percent(figures["high"])
            row = (_percent(figures["accuracy"]), f"{low} to {high}", f"{figures['n']:,}")
            table.add_row(view if i == 0 else "", _label(entry), *row)
        table.add_section()
    console.print(table)

    if retrieval := metrics.get("retrieval"):
        console.print()
        table = Table(f"retrieval among {retrieval['n']:,} scenes", box=style)
        for column in ("recall@1", "recall@5"):
            table.add_column(column, justify="right")
        for direction in ("text_to_image", "image_to_text"):
            recalls = retrieval[direction]
            table.add_row(
                direction.replace("_", " "),
                *(_percent(recalls[column]) for column in ("recall@1", "recall@5")),
            )
        console.print(table)


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes the metrics as JSON, all or nothing: a reader never sees half a file.

    Raises:
      ValueError: a figure is NaN or infinite, which JSON cannot hold.
      WriteError: the file cannot be written; what was there before is kept.
    """
    write_whole(path, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _label(entry: str) -> str:
    """needs_both_image_only -> "  image only", as it stands below "needs both"."""
    if entry.startswith("needs_both_"):
        return "  " + entry.removeprefix("needs_both_").replace("_", " ")
    return {"non_relational": "non-relational"}.get(entry, entry.replace("_", " "))
