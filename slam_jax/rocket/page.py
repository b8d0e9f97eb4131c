"""A leaderboard for people, as a self-contained HTML page, as Markdown and on a terminal."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple

import jinja2
from rich.console import Console
from rich.table import Table as TerminalTable


class Table(NamedTuple):
    """rows: one cell a column. note: printed above it. sortable: by a click on a column's title,
    on the HTML page. short: the columns that a terminal shows; none = it does not show the table.
    """

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
    """SVG of `slam_jax.reporting.plots`, by caption."""

    title: str
    plots: Mapping[str, str]
    note: str = ""


Section = Table | Bullets | Plots


class Page(NamedTuple):
    """notes: paragraphs before the sections."""

    title: str
    notes: Sequence[str]
    sections: Sequence[Section]


def html(page: Page) -> str:
    """The whole page; text from users and systems is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("slam_jax.rocket") / "templates" / "leaderboard.html"
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        page=page, sections=[(type(section).__name__, section) for section in page.sections]
    )


def markdown(page: Page) -> str:
    """Everything except the plots."""
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
    lines = [columns, ("---",) * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def print_page(page: Page, console: Console | None = None) -> None:
    """Prints the short columns of the tables that have some."""
    console = console or Console(highlight=False)
    for section in page.sections:
        if not isinstance(section, Table) or not section.short:
            continue
        table = TerminalTable(title=section.title, box=None, padding=(0, 1), title_justify="left")
        for name in section.short:
            table.add_column(name, justify="left" if name == "system" else "right")
        for row in section.rows:
            cells = dict(zip(section.columns, row, strict=True))
            table.add_row(*(cells[name] for name in section.short))
        console.print(table)
