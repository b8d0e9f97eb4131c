"""The metrics of an evaluation as a table on the terminal and as a JSON file."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from slam_jax.errors import shorten, write_whole
from slam_jax.evaluation.scores import METRICS, show_score

_LABELS = {"non_relational": "non-relational", "needs_both": "needs both"}
_SHOWN_ANSWERS, _LONGEST_ANSWER = 10, 40


def print_metrics(metrics: Mapping[str, Any], file: Any = None) -> None:
    """Prints accuracies with 95% intervals by view and kind of question, then the other scores, the
    accuracies by expected answer, and retrieval.

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
    _print_scores(console, metrics)
    _print_answers(console, metrics)
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


def _print_scores(console: Console, metrics: Mapping[str, Any]) -> None:
    rows = [
        (view, entry_label(entry), METRICS[name].label, *show_cells(name, score))
        for view, entries in metrics["views"].items()
        for entry, row in entries.items()
        for name, score in row.get("scores", {}).items()
    ]
    if rows:
        console.print()
        columns = ("view", "questions", "metric", "score", "95% interval", "n", "baseline")
        print_table(console, None, columns, rows, num_left=3)


def show_cells(name: str, score: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A score of the metric `name`, its interval, count and baseline, as tables show them."""
    low, high = (show_score(name, score[end]) for end in ("low", "high"))
    interval = "-" if score["low"] is None else f"{low} to {high}"
    value, baseline = (show_score(name, score[which]) for which in ("score", "baseline"))
    return value, interval, f"{score['n']:,}", baseline


def _print_answers(console: Console, metrics: Mapping[str, Any]) -> None:
    pooled = metrics.get("answers", {}).get("pooled", {}).get("answers", [])
    if not pooled or pooled[0]["n"] == 1:  # free text: no answer is expected twice
        return
    rows = [
        (
            shorten(" ".join(row["answer"].split()), _LONGEST_ANSWER),
            percent(row["accuracy"]),
            f"{percent(row['low'])} to {percent(row['high'])}",
            f"{row['n']:,}",
            shorten(show_confusions(row["instead"]), _LONGEST_ANSWER),
        )
        for row in pooled[:_SHOWN_ANSWERS]
    ]
    console.print()
    columns = ("expected answer", "right", "95% interval", "n", "instead")
    print_table(console, None, columns, rows)
    if more := len(pooled) - len(rows):
        console.print(f"and {more} more in metrics.json and the report")
    for note in explain_untested(metrics):
        console.print(note, soft_wrap=True)


def show_confusions(confusions: Iterable[Mapping[str, Any]]) -> str:
    """The wrong answers with their counts: "cat (3), a dog (1)"."""
    return ", ".join(f"{' '.join(x['answer'].split())} ({x['n']:,})" for x in confusions)


def explain_untested(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence about the answers of training that no test question expects; [] without any."""
    untested = metrics.get("untested_answers")
    if not untested:
        return []
    named = ", ".join(
        f'"{shorten(x["answer"], _LONGEST_ANSWER)}" ({percent(x["share"])})' for x in untested
    )
    return [f"no test question expects these answers of the training split: {named}"]


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
