"""A comparison as a table on the terminal and as a self-contained page."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slam_jax.errors import shorten, write_whole
from slam_jax.evaluation.scores import EXACT_MATCH, METRICS, show_score
from slam_jax.evaluation.table import entry_label, make_console, print_table, write_metrics
from slam_jax.reporting.compare.sides import Side
from slam_jax.reporting.plots import plot_differences
from slam_jax.reporting.rendering import render_template
from slam_jax.version import __version__

ROW_KINDS = {"gained": "only B is right", "lost": "only A is right", "other": "other texts"}
_COLUMNS = ("view", "questions", "metric", "A", "B", "B - A", "95% interval", "n", "p")
_SHOWN_ROWS, _LONGEST = 5, 40


def print_comparison(found: Mapping[str, Any], sides: tuple[Side, Side], file: Any = None) -> None:
    """Prints the table of `compare_answers`, and a few questions that were answered differently.

    file: a text file, standard output by default.
    """
    console = make_console(file, width=140)
    for letter, side in zip("AB", sides, strict=True):
        console.print(f"{letter}: {describe_side(side)}", soft_wrap=True)
    print_table(console, None, _COLUMNS, list(table_rows(found)), num_left=3)
    console.print(explain_differences(found), soft_wrap=True)
    for kind, label in ROW_KINDS.items():
        group = found["rows"][kind]
        if not group["n"]:
            continue
        console.print()
        title = f"{label}: {group['n']:,} questions"
        rows = [[_short(cell) for cell in row] for row in question_rows(group["rows"])]
        columns = ("view", "example", "question", "expected", "A", "B")
        print_table(console, title, columns, rows[:_SHOWN_ROWS], num_left=6)


def write_comparison(
    folder: str | Path, found: Mapping[str, Any], sides: tuple[Side, Side]
) -> Path:
    """Writes `compare.json` and `compare.html`, and returns the path of the page.

    Raises WriteError where they cannot be written.
    """
    folder = Path(folder)
    about = {
        letter: {"path": side.path, "step": side.step, "data": side.data}
        for letter, side in zip("ab", sides, strict=True)
    }
    write_metrics(folder / "compare.json", {**about, **found})
    write_whole(folder / "compare.html", render_comparison(found, sides))
    return folder / "compare.html"


def render_comparison(found: Mapping[str, Any], sides: tuple[Side, Side]) -> str:
    """The page as text."""
    exact = [
        (view, entry_label(entry), row[EXACT_MATCH])
        for view, entries in found["views"].items()
        for entry, row in entries.items()
        if row.get(EXACT_MATCH, {}).get("difference") is not None
    ]
    ends = ("difference", "low", "high")
    return render_template(
        "compare.html",
        sides=[(letter, describe_side(side)) for letter, side in zip("AB", sides, strict=True)],
        columns=_COLUMNS,
        rows=list(table_rows(found)),
        plot=plot_differences([(v, e, *(row[end] for end in ends)) for v, e, row in exact])
        if exact
        else "",
        explanation=explain_differences(found),
        groups=[
            (label, found["rows"][kind]["n"], list(question_rows(found["rows"][kind]["rows"])))
            for kind, label in ROW_KINDS.items()
        ],
        version=__version__,
    )


def table_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of the table of differences, as text."""
    for view, entries in found["views"].items():
        for entry, metrics in entries.items():
            for name, row in metrics.items():
                a, b = (show_score(name, row[side]) for side in ("a", "b"))
                difference, low, high = (
                    show_score(name, row[end], sign=True) for end in ("difference", "low", "high")
                )
                interval = "-" if row["difference"] is None else f"{low} to {high}"
                p = show_p(row["p"]) if "p" in row else ""
                label = METRICS[name].label
                cells = (a, b, difference, interval, f"{row['n']:,}", p)
                yield (view, entry_label(entry), label, *cells)


def question_rows(rows: Any) -> Iterator[tuple[str, ...]]:
    """View, example, question, right answers, and both answers, as text."""
    for row in rows:
        place = row["place"].rpartition("/")[2] or str(row["scene"])
        yield (row["view"], place, row["prompt"], " | ".join(row["references"]), row["a"], row["b"])


def describe_side(side: Side) -> str:
    """The path, the checkpoint and the data."""
    step = "" if side.step is None else f", step {side.step:,}"
    data = side.data or {}
    name = data.get("path") or data.get("name")
    return f"{side.path}{step}" + (f", on {name}" if name else "")


def explain_differences(found: Mapping[str, Any]) -> str:
    """How the intervals and p values were computed."""
    text = (
        "Differences of shares are in percentage points. Intervals are by paired bootstrap over "
        "examples, and each says something about its own row alone."
    )
    rows = (row for entries in found["views"].values() for row in entries.values())
    if any(EXACT_MATCH in row for row in rows):
        text += (
            " p is of the exact sign test over examples, which is McNemar's test where an example "
            "has one question."
        )
    return text


def show_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _short(text: str) -> str:
    return shorten(" ".join(text.split()), _LONGEST)
