"""The figures of encoder processes on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from slam_jax.evaluation.table import entry_label, make_console, percent, print_table
from slam_jax.reporting.processes.measure import knock_outs


def print_processes(found: Mapping[str, Any], file: Any = None) -> None:
    """Prints the tables of `measure_processes`. file: a text file, standard output by default."""
    console = make_console(file, width=140)
    names = list(knock_outs(found["processes"]))

    def rows(cell: Any, shown: Sequence[str]) -> list[Any]:
        table: list[Any] = []
        for view, kinds in found["accuracy"].items():
            for i, (kind, row) in enumerate(kinds.items()):
                cells = (cell(row[name]) for name in shown)
                table.append(("" if i else view, entry_label(kind), *cells))
        return table

    def share(entry: Mapping[str, Any]) -> str:
        return percent(entry["accuracy"]["mean"])

    def difference(entry: Mapping[str, Any]) -> str:
        low, high = (100 * entry["difference"][end] for end in ("low", "high"))
        return f"{low:+.1f} to {high:+.1f}"

    columns = ("view", "questions")
    print_table(console, "right", (*columns, *names), rows(share, names), 2)
    title = "difference to all, percentage points, 95% intervals"
    print_table(console, title, (*columns, *names[1:]), rows(difference, names[1:]), 2)
    measures = ("cka", "cosine")
    pairs = [
        (view, f"p{row['pair'][0]} p{row['pair'][1]}", *(_shown(row[name]) for name in measures))
        for view, rows in found["similarity"].items()
        for row in rows
    ]
    if pairs:
        print_table(console, "similarity of outputs", ("view", "pair", *measures), pairs, 2)
    attention = [
        (view, f"p{p}", ", ".join(f"{name} {_shown(x)}" for name, x in row.items()))
        for view, rows in found["attention"].items()
        for p, row in enumerate(rows)
    ]
    if attention:
        columns = ("view", "process", "share of the shared attention, by stream")
        print_table(console, None, columns, attention, 3)


def _shown(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"
