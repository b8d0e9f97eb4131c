"""The page of the protocol `ablation`."""

from slam_jax.reporting.plots import plot_bars
from slam_jax.rocket import sections
from slam_jax.rocket.page import Page, Plots, Section
from slam_jax.rocket.tasks import Json

OVERALL = "all questions"
_WHAT = (
    "Variants of one model, trained alike on the same examples and tested on the same scenes. The "
    "changes are listed; everything else is as in the first variant."
)
_ACCURACIES_NOTE = (
    "needs both: questions that cannot be answered from one half of a split scene; only: the same "
    "questions, given one half."
)
_DIFFERENCES_NOTE = (
    "Paired differences to the first variant in percentage points, with 95% intervals over scenes "
    "(2,000 resamples) and seeds (Student's t). * marks differences that are significant at 95%; "
    "by chance one in twenty is."
)
_SHORT = ("variant", "parameters", "all questions, %", "difference to the first, points")


def make_page(board: Json) -> Page:
    """The board as tables and plots."""
    rows, parts = sections.successful(board), sections.failed(board)
    if rows:
        bars = {row["system"]: 100 * row["accuracy"][OVERALL]["mean"] for row in rows}
        seeds = {f"seed {run['seed']}": i for i, run in enumerate(rows[0]["runs"])}
        parts += [
            *_tables(rows),
            Plots("All questions", {"% right, mean over seeds": plot_bars(bars)}),
            sections.cross_table(
                "Seeds",
                seeds,
                rows,
                lambda row, i: f"{100 * row['runs'][i]['accuracy'][OVERALL]:.1f}",
                "All questions, %.",
                first="variant",
            ),
        ]
    parts += sections.closing(board)
    return Page("Rocket Engine: ablation", [_WHAT, describe(board)], parts)


def describe(board: Json) -> str:
    """Settings and machine in a sentence or two."""
    base = board["settings"]["base"]
    stages = "; ".join(
        f"from step {first} on " + ", ".join(f"{view} {rate:g}" for view, rate in rates.items())
        for first, rates in base["data"]["stages"]
    )
    return (
        f"{base['data']['name']}, {base['run']['num_steps']:,} steps of "
        f"{base['data']['batch_size']} examples ({stages}), {len(board['settings']['seeds'])} "
        f"seeds. {sections.describe_machine(board)}"
    )


def _tables(rows: list[Json]) -> list[Section]:
    entries = {entry: entry for entry in rows[0]["accuracy"] if entry != OVERALL}
    return [
        sections.make_table("Variants", _VARIANTS, rows, short=_SHORT),
        sections.cross_table(
            "By kind of question, % right",
            entries,
            rows,
            _percent,
            _ACCURACIES_NOTE,
            first="variant",
            sortable=True,
        ),
        sections.cross_table(
            "By kind of question, difference to the first variant",
            entries,
            [row for row in rows if row["difference"] is not None],
            _points,
            _DIFFERENCES_NOTE,
            first="variant",
        ),
    ]


def _changes(row: Json) -> str:
    changes = [
        f"{name.split('.')[-1]} {', '.join(to) if isinstance(to, list) else to}"
        for name, to in row["changes"].items()
    ]
    return ", ".join(changes) or "none"


def _megaflops(row: Json, *parts: str) -> str:
    totals = [sum(flops[part] for part in parts) for flops in row["flops"].values()]
    return " / ".join(f"{total / 1e6:.2f}" for total in totals)


def _percent(row: Json, entry: str) -> str:
    return sections.with_range(row["accuracy"][entry], ".1f", 100.0)


def _points(row: Json, entry: str) -> str:
    if row["difference"] is None:
        return ""
    difference = row["difference"][entry]
    significant = not difference["low"] <= 0 <= difference["high"]
    return sections.with_range(difference, "+.1f", 100.0) + (" *" if significant else "")


_VARIANTS = {
    "variant": "{system}",
    "all questions, %": lambda row: _percent(row, OVERALL),
    "difference to the first, points": lambda row: _points(row, OVERALL),
    "changes": _changes,
    "parameters": "{parameters:,}",
    "encoder, MFLOP a scene": lambda row: _megaflops(row, "encoder"),
    "all, MFLOP a scene": lambda row: _megaflops(row, "encoder", "decoder"),
}
