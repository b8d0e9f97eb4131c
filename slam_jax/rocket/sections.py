"""Sections of a leaderboard's page, from the rows of the board."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slam_jax.reporting.plots import plot_bars, plot_points
from slam_jax.rocket.metrics import Metric
from slam_jax.rocket.page import Bullets, Plots, Section, Table
from slam_jax.rocket.tasks import Json

# A format string of the row's fields, or a function of the row.
Cell = str | Callable[[Json], str]


def make_table(
    title: str,
    columns: Mapping[str, Cell],
    rows: Sequence[Json],
    note: str = "",
    *,
    sortable: bool = True,
    short: Sequence[str] = (),
) -> Table:
    """A table of the board's rows. columns: the cell of each, by title."""
    cells = [
        [cell.format(**row) if isinstance(cell, str) else cell(row) for cell in columns.values()]
        for row in rows
    ]
    return Table(title, tuple(columns), cells, note, sortable, short)


def cross_table(
    title: str,
    keys: Mapping[str, Any],
    rows: Sequence[Json],
    cell: Callable[[Json, Any], str],
    note: str = "",
    *,
    first: str = "system",
    sortable: bool = False,
) -> Table:
    """A table of the board's rows with a column for each key, such as the seeds. keys: by title."""
    cells = [[row["system"], *(cell(row, key) for key in keys.values())] for row in rows]
    return Table(title, (first, *keys), cells, note, sortable)


def with_range(figure: Any, form: str = ",.0f", scale: float = 1.0) -> str:
    """ "middle (low to high)" of an interval or of repeated measurements."""
    keys = ("mean", "low", "high") if "mean" in figure else ("median", "least", "most")
    middle, low, high = (format(scale * figure[key], form) for key in keys)
    return f"{middle} ({low} to {high})"


def ranged(path: str, form: str = ",.0f", scale: float = 1.0) -> Cell:
    """A cell with the range of a field, given as in `Metric`."""
    return lambda row: with_range(Metric(path).of(row), form, scale)


def number(path: str, form: str, scale: float = 1.0) -> Cell:
    """A cell with a scaled field, given as in `Metric`."""
    return lambda row: format(Metric(path, scale=scale).of(row), form)


PEAK_MEMORY = number("peak_memory_bytes", ".2f", 2**-30)  # in GiB


def successful(board: Json) -> list[Json]:
    return [row for row in board["rows"] if row["status"] == "ok"]


def failed(board: Json) -> list[Section]:
    """The systems that failed and why; nothing if there are none."""
    texts = [f"{x['system']}: {x['reason']}" for x in board["rows"] if x["status"] != "ok"]
    return [Bullets("Failed", texts)] if texts else []


def winner_plots(rows: Sequence[Json], metrics: Mapping[str, Metric]) -> Plots:
    """Bars of every system, one plot a metric."""
    plots = {
        title: plot_bars({row["system"]: metric.of(row) for row in rows}, lowest=metric.least)
        for title, metric in metrics.items()
    }
    return Plots("Category winners", plots)


def cost_plots(
    title: str, rows: Sequence[Json], quality: Metric, unit: str, costs: Mapping[str, Metric]
) -> Plots:
    """A quality against several costs, which are given by "caption, unit"."""
    plots = {}
    for name, cost in costs.items():
        caption, label = name.rsplit(", ", 1)
        points = {row["system"]: (cost.of(row), quality.of(row)) for row in rows}
        plots[caption] = plot_points(points, label, unit)
    return Plots(title, plots)


def closing(board: Json) -> list[Section]:
    """The winners, and how the score is computed, if there is one."""
    cells = [
        (name, winner["system"], f"{winner['value']:,.4g}")
        for name, winner in board["category_winners"].items()
    ]
    sections: list[Section] = [Table("Winners", ("category", "system", "value"), cells)]
    if "score_rule" in board:
        rule = [f"{part}: {rule}" for part, rule in board["score_rule"].items()]
        note = "Out of 100 points, by the same rule for every row."
        sections.append(Bullets("How the score is computed", rule, note))
    return sections


def describe_machine(board: Json) -> str:
    """The machine, the versions and the dates, in one sentence."""
    machine, measured = board["machine"], board["measured"]
    days = dict.fromkeys(measured[end][:10] for end in ("first", "last"))
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, device "
        f"{machine['device']}; Python {machine['python']}, jax {machine['jax']}, slam_jax "
        f"{' and '.join(measured['code'])}; measured {' to '.join(days)}."
    )
