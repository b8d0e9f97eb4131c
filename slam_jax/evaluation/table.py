"""The metrics of an evaluation as a table on the terminal and as a JSON file."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from slam_jax.errors import shorten, write_whole

_LABELS = {"non_relational": "non-relational", "needs_both": "needs both"}


def print_metrics(metrics: Mapping[str, Any], file: Any = None) -> None:
    """Prints accuracies with 95% intervals by view and kind of question, then retrieval.

    file: a text file, standard output by default.
    """
    console, baseline = make_console(file), metrics.get("baseline_answer")
    columns, rows = ["view", "questions", "right", "95% interval", "n"], []
    columns += ["baseline"] if baseline else []
    for view, entries in metrics["views"].items():
        for i, (entry, row) in enumerate(entries.items()):
            interval = f"{percent(row['low'])} to {percent(row['high'])}"
            cells = [percent(row["accuracy"]), interval, f"{row['n']:,}"]
            cells += [percent(row["baseline"])] if baseline else []
            rows.append(("" if i else view, entry_label(entry), *cells))
        rows.append(None)
    print_table(console, f"step {metrics['step']:,}", columns, rows, num_left=2)
    if baseline:
        console.print(f"baseline: {explain_baseline(metrics)}")
    if retrieval := metrics.get("retrieval"):
        recalls = ("recall@1", "recall@5")
        rows = [
            (
                direction.replace("_", " "),
                *(percent(retrieval[direction][name]) for name in recalls),
            )
            for direction in ("text_to_image", "image_to_text")
        ]
        console.print()
        print_table(console, None, (f"retrieval among {retrieval['n']:,} scenes", *recalls), rows)


def make_console(file: Any = None, width: int = 100) -> Console:
    """Rules and colours on a terminal, plain columns elsewhere; never markup or emoji codes.

    width: of a line that does not go to a terminal.
    """
    plain: Any = dict(file=file, markup=False, emoji=False, highlight=False)
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=width, color_system=None)


def print_table(
    console: Console,
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str] | None],
    num_left: int = 1,
) -> None:
    """Prints a table. None = a rule. num_left: columns of words, which come first; the others are
    of figures and aligned to the right."""
    if title is not None:
        console.print(title, style="italic", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < num_left else "right")
    for row in rows:
        table.add_section() if row is None else table.add_row(*row)
    console.print(table)


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes the metrics as JSON, whole or not at all. Raises ValueError for NaN or infinity, which
    JSON lacks, and WriteError where the file cannot be written; an older one is then kept."""
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
