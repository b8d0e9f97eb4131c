"""What was found in a data set, as tables."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from slam_jax.errors import shorten
from slam_jax.reporting.inspection import Inspection

_ANSWERS = 10
_INPUTS = ("text", "image", "aux", "tokens")


def print_inspection(found: Inspection, file: Any = None) -> None:
    """Prints what was found, on a terminal with rules and colours, elsewhere as plain columns.

    `file` is open for text, standard output by default.
    """
    page = _Page(file)
    sizes = [
        (split, f"{len(getattr(found.dataset, split)):,}")
        for split in ("train", "validation", "test")
    ]
    page.table(found.name, ("split", "records"), sizes)
    _print_views(page, found)
    _print_texts(page, found)
    _print_numbers(page, found)
    if found.table is not None:
        for note in found.dataset.notes:
            page.line(note)
        most = found.config.max_damaged_records
        refused = "; training refuses more" if len(found.bad) > most else ""
        page.line(
            f"rows that cannot be used: {len(found.bad):,} "
            f"(data.max_damaged_records={most:,}{refused})"
        )
        for row, reason in found.bad:
            page.line(f"  row {row}: {reason}")


def _print_views(page: "_Page", found: Inspection) -> None:
    rows = []
    for view, shapes in found.shapes.items():
        starts = [stage.first for stage in found.config.stages if stage.rates.get(view)]
        first = f"{starts[0]:,}" if starts else "-"
        rows.append((view, first, *(shapes.get(name, "-") for name in _INPUTS)))
    title = f"views, and the shapes of a batch of {found.config.batch_size:,}"
    page.table(title, ("view", "used from step", *_INPUTS), rows)


def _print_texts(page: "_Page", found: Inspection) -> None:
    rows = []
    for part, counts in found.lengths.items():
        figures = (min(counts), statistics.median_low(counts), max(counts))
        rows.append((part, *(f"{figure:,}" for figure in figures)))
    known = found.dataset.tokenizer.vocab_size
    title = f"tokens, of {known:,} in the vocabulary, in {found.sampled:,} training examples"
    page.table(title, ("of a", "min", "median", "max"), rows)

    total = sum(found.answers.values())
    common = Counter(found.answers).most_common(_ANSWERS)
    shown = [(shorten(" ".join(answer.split()), 45), count) for answer, count in common]
    if others := len(found.answers) - len(common):
        shown.append((f"({others:,} others)", total - sum(count for _, count in common)))
    rows = [(answer, f"{count:,}", f"{100 * count / total:.1f}%") for answer, count in shown]
    page.table("their answers", ("answer", "times", "share"), rows)


def _print_numbers(page: "_Page", found: Inspection) -> None:
    aux = found.dataset.aux_format
    if aux is None:
        return
    if aux.mean is None or aux.scale is None:
        page.line(f"numbers of an auxiliary vector: {', '.join(aux.names)}\n")
        return
    columns = zip(aux.names, aux.mean, aux.scale, strict=False)  # no rows for training, no figures
    rows = [(name, f"{mean:.6g}", f"{scale:.6g}") for name, mean, scale in columns]
    page.table("columns of numbers", ("column", "mean", "scale"), rows)


class _Page:
    """Tables and lines; nothing in a text is taken for markup."""

    def __init__(self, file: Any):
        plain: dict[str, Any] = dict(file=file, markup=False, highlight=False, emoji=False)
        console = Console(**plain)
        if not console.is_terminal:
            console = Console(**plain, width=100, color_system=None)
        self._console = console

    def line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def table(self, title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """The first column is of words, the others are of figures."""
        self._console.print(title, style="italic", soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD if self._console.is_terminal else None)
        for i, name in enumerate(names):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        self._console.print()
