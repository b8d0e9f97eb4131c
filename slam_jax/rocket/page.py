"""A leaderboard for people: a page of HTML that needs nothing but itself, Markdown, a terminal."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple

import jinja2
import markupsafe
from rich.console import Console
from rich.table import Table as TerminalTable


class Table(NamedTuple):
    """rows: a cell a column. note: what is to be known of it. sortable: on the HTML page, by each
    column. short: the columns that a terminal has room for; none = it is not shown there."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    sortable: bool = False
    short: Sequence[str] = ()


class Bullets(NamedTuple):
    """A list of sentences."""

    title: str
    items: Sequence[str]
    note: str = ""


class Plots(NamedTuple):
    """SVG of `slam_jax.reporting.plots`, with what each shows."""

    title: str
    plots: Mapping[str, str]
    note: str = ""


class Page(NamedTuple):
    """notes: paragraphs before everything else."""

    title: str
    notes: Sequence[str]
    sections: Sequence[Table | Bullets | Plots]


def html(page: Page) -> str:
    """All of it; what comes from users or systems is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("slam_jax.rocket") / "templates" / "leaderboard.html"
    sections = [
        section._replace(
            plots={name: markupsafe.Markup(plot) for name, plot in section.plots.items()}
        )
        if isinstance(section, Plots)
        else section
        for section in page.sections
    ]
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        page=page, sections=[(type(section).__name__, section) for section in sections]
    )


def markdown(page: Page) -> str:
    """All but the plots."""
    lines = [f"# {page.title}", ""]
    for note in page.notes:
        lines += [note, ""]
    for section in page.sections:
        if isinstance(section, Plots):
            continue
        lines += [f"## {section.title}", ""]
        if section.note:
            lines += [section.note, ""]
        if isinstance(section, Table):
            lines += markdown_table(section.columns, section.rows)
        else:
            lines += [f"- {item}" for item in section.items]
        lines.append("")
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, after those of the head."""
    lines = [columns, ("---",) * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def print_page(page: Page, console: Console | None = None) -> None:
    """What a terminal has room for: the short columns of those tables that have some."""
    console = console or Console(highlight=False)
    for section in page.sections:
        if isinstance(section, Bullets) or not getattr(section, "short", ()):
            continue
        assert isinstance(section, Table)
        places = [section.columns.index(name) for name in section.short]
        table = TerminalTable(title=section.title, box=None, padding=(0, 1), title_justify="left")
        for name in section.short:
            table.add_column(name, justify="left" if name == "system" else "right")
        for row in section.rows:
            table.add_row(*(row[place] for place in places))
        console.print(table)
