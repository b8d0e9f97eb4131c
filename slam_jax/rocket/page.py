"""A leaderboard for people: Markdown from the template of its protocol, and HTML from that.

A template, templates/<protocol>.md, extends page.md. It has the `board`, the `rows` that did not
fail, `plots` (whether to plot; true for HTML), `plot(caption, svg)`, and `_FUNCTIONS`.
"""

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jinja2
from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown

from slam_jax.reporting.plots import plot_bars, plot_curves, plot_points
from slam_jax.rocket.metrics import Metric
from slam_jax.rocket.tasks import Json

UNITS = {"ms": 1e3, "%": 100.0, "GiB": 2**-30, "M": 1e-6}
_LEFT = (
    "system",
    "category",
    "variant",
    "changes",
    "widths",
    "levels, s",
    "ended because",
)  # columns of words
Cell = str | Callable[[Json], str]


class Page(NamedTuple):
    """short: what a terminal shows."""

    markdown: str
    html: str
    short: str


def show(value: Any, form: str, unit: str = "") -> str:
    """A number in a unit; an interval or repeated measurements as "middle (low to high)"."""
    if not isinstance(value, Mapping):
        return format(UNITS[unit] * value if unit else value, form)
    keys = ("mean", "low", "high") if "mean" in value else ("median", "least", "most")
    middle, low, high = (show(value[key], form, unit) for key in keys)
    return f"{middle} ({low} to {high})"


class _Formatter(string.Formatter):
    """Fields are paths as in `Metric`, with a unit or without."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        path, _, unit = field_name.rpartition(" ")
        path, unit = (path, unit) if unit in UNITS else (field_name, "")
        return (Metric(path).of(kwargs), unit), path

    def format_field(self, value: Any, format_spec: str) -> str:
        number, unit = value
        return show(number, format_spec, unit)


def cell(form: Cell, row: Json) -> str:
    """The text of a cell: of a function of the row, or of a format string of fields.

    Fields are given as in `Metric` and may have a unit: "{seconds.median ms:.1f}". Intervals and
    repeated measurements become "middle (low to high)".
    """
    text = _Formatter().vformat(form, (), row) if isinstance(form, str) else form(row)
    return text.strip().replace("|", "\\|")


def table(rows: Iterable[Json], columns: Mapping[str, Cell], chosen: Sequence[str] = ()) -> str:
    """A table of the board's rows. columns: the `cell` of each, by title. chosen: () = all."""
    names = chosen or list(columns)
    titles = [name.replace("|", "\\|") for name in names]
    cells = [[cell(columns[name], row) for name in names] for row in rows]
    head, _, *lines = markdown_table(titles, cells)
    sides = (":---" if name in _LEFT else "---:" for name in names)
    return "\n".join([head, f"| {' | '.join(sides)} |", *lines])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ("---",) * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def across(keys: Iterable[Any], form: Callable[[Any, Json], str]) -> dict[str, Cell]:
    """A column for each key, such as the learning rates. form: a function of a key and the row."""
    return {f"{key}": partial(form, key) for key in keys}


def across_seeds(rows: Sequence[Json], form: Callable[[Any, Json], str]) -> dict[str, Cell]:
    """A column for each seed. form: a function of the number of a run and the row."""
    return {f"seed {run['seed']}": partial(form, i) for i, run in enumerate(rows[0]["runs"])}


def bars(rows: Sequence[Json], path: str, unit: str = "", least: bool = False) -> str:
    """A bar for every system. path: a field, as in `Metric`. least: whether the lowest is best."""
    metric = Metric(path, scale=UNITS.get(unit, 1.0))
    return plot_bars({row["system"]: metric.of(row) for row in rows}, lowest=least)


def points(rows: Sequence[Json], x: str, y: str, xlabel: str, ylabel: str, unit: str = "") -> str:
    """A point for every system. x, y: fields, as in `Metric`. unit: of x."""
    cost, quality = Metric(x, scale=UNITS.get(unit, 1.0)), Metric(y)
    return plot_points({r["system"]: (cost.of(r), quality.of(r)) for r in rows}, xlabel, ylabel)


def series(rows: Sequence[Json], field: str, xlabel: str, ylabel: str, unit: str = "") -> str:
    """A curve for every system: a list of numbers."""
    scale = UNITS.get(unit, 1.0)
    curves = {
        row["system"]: (list(range(len(row[field]))), [scale * y for y in row[field]])
        for row in rows
    }
    return plot_curves(curves, ylabel, xlabel=xlabel)


def mean_curves(rows: Sequence[Json], x: str, y: str, xlabel: str, ylabel: str) -> str:
    """A curve for every system: fields of the points of its runs' curves, mean over seeds."""
    curves = {}
    for row in rows:
        xs, ys = ([[point[key] for point in run["curve"]] for run in row["runs"]] for key in (x, y))
        means = [sum(values) / len(values) for values in zip(*ys, strict=True)]
        curves[row["system"]] = list(map(float, xs[0])), means
    return plot_curves(curves, ylabel, xlabel=xlabel)


_FUNCTIONS = {
    function.__name__: function
    for function in (cell, show, table, across, across_seeds, bars, points, series, mean_curves)
} | {"number": format}


def make_page(template: str, board: Json) -> Page:
    """The page of a board, from the template of a protocol."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slam_jax.rocket"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = [row for row in board["rows"] if row["status"] == "ok"]
    figures: list[str] = []

    def plot(caption: str, svg: str) -> str:
        figures.append(svg)
        return f"![{caption}]({len(figures) - 1})"

    environment.filters["number"] = format
    environment.globals |= _FUNCTIONS | {"plot": plot, "board": board, "rows": rows}
    source = environment.get_template(f"{template}.md")
    text = re.sub(r"\n{3,}", "\n\n", source.render(plots=False))
    html = to_html(source.render(plots=True), figures)
    module: Any = source.make_module({"plots": False})
    return Page(text, html, module.short())


def to_html(text: str, figures: Sequence[str] = ()) -> str:
    """A self-contained HTML page of Markdown. Its images are numbers of figures, which are SVG;
    markup in the text is escaped."""

    def figure(match: re.Match[str]) -> str:
        number, caption = match.groups()
        return f"<figure><figcaption>{caption}</figcaption>{figures[int(number)]}</figure>"

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r"<p>((?:<img [^>]*>\s*)+)</p>", r'<div class="plots">\1</div>', body)
    body = re.sub(r'<img src="(\d+)" alt="(.*?)" />', figure, body)
    body = re.sub(r"(<table>.*?</table>)", r'<div class="scroll">\1</div>', body, flags=re.S)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("slam_jax.rocket"))
    title = text.splitlines()[0].lstrip("# ")
    return environment.get_template("leaderboard.html").render(title=title, body=body)


def print_page(page: Page, console: Console | None = None) -> None:
    """Prints the short tables."""
    (console or Console(highlight=False)).print(Markdown(page.short))
