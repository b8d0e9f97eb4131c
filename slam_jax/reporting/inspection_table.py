"""An inspection of a data set, printed as tables."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from slam_jax.errors import shorten
from slam_jax.reporting.inspection import Inspection

_MAX_ANSWERS = 10
_INPUTS = ("text", "image", "aux", "tokens")


def print_inspection(found: Inspection, file: Any = None) -> None:
    """Prints the findings to `file`, standard output by default.

    A terminal shows rules and colours, anything else plain columns.
    """
    plain: dict[str, Any] = dict(file=file, markup=False, highlight=False, emoji=False)
    console = Console(**plain)
    if not console.is_terminal:
        console = Console(**plain, width=100, color_system=None)
    splits = ("train", "validation", "test")
    sizes = [(split, f"{len(getattr(found.dataset, split)):,}") for split in splits]
    _table(console, found.name, ("split", "records"), sizes)
    _print_views(console, found)
    _print_texts(console, found)
    _print_numbers(console, found)
    for note in found.dataset.notes:
        _line(console, note)
    if found.dataset.table is not None:
        limit = found.config.max_damaged_records
        refused = "; training refuses more" if len(found.bad) > limit else ""
        _line(
            console,
            f"rows that cannot be used: {len(found.bad):,} "
            f"(data.max_damaged_records={limit:,}{refused})",
        )
        for row, reason in found.bad:
            _line(console, f"  row {row}: {reason}")


def _print_views(console: Console, found: Inspection) -> None:
    rows = []
    for view, shapes in found.shapes.items():
        starts = [stage.first for stage in found.config.stages if stage.rates.get(view)]
        first = f"{starts[0]:,}" if starts else "-"
        rows.append((view, first, *(shapes.get(name, "-") for name in _INPUTS)))
    title = f"views, and the shapes of a batch of {found.config.batch_size:,}"
    _table(console, title, ("view", "used from step", *_INPUTS), rows)


def _print_texts(console: Console, found: Inspection) -> None:
    rows = []
    for part, counts in found.lengths.items():
        figures = (min(counts), statistics.median_low(counts), max(counts))
        rows.append((part, *(f"{figure:,}" for figure in figures)))
    known = found.dataset.tokenizer.vocab_size
    title = f"tokens, of {known:,} in the vocabulary, in {found.num_examples:,} training examples"
    _table(console, title, ("of a", "min", "median", "max"), rows)

    total = sum(found.answers.values())
    common = Counter(found.answers).most_common(_MAX_ANSWERS)
    shown = [(shorten(" ".join(answer.split()), 45), count) for answer, count in common]
    if others := len(found.answers) - len(common):
        shown.append((f"({others:,} others)", total - sum(count for _, count in common)))
    rows = [(answer, f"{count:,}", f"{100 * count / total:.1f}%") for answer, count in shown]
    _table(console, "their answers", ("answer", "times", "share"), rows)


def _print_numbers(console: Console, found: Inspection) -> None:
    aux = found.dataset.aux_format
    if aux is None:
        return
    if aux.mean is None or aux.scale is None:
        _line(console, f"numbers of an auxiliary vector: {', '.join(aux.names)}\n")
        return
    columns = zip(aux.names, aux.mean, aux.scale, strict=False)  # empty without training rows
    rows = [(name, f"{mean:.6g}", f"{scale:.6g}") for name, mean, scale in columns]
    _table(console, "columns of numbers", ("column", "mean", "scale"), rows)


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _table(
    console: Console, title: str, names: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """The first column holds words, the others figures."""
    console.print(title, style="italic", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None)
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
