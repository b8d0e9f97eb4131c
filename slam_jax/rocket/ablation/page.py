"""The page of an ablation."""

from slam_jax.reporting.plots import plot_bars
from slam_jax.rocket.ablation.board import OVERALL
from slam_jax.rocket.board import describe_machine_of, winners_table
from slam_jax.rocket.page import Bullets, Page, Plots, Table
from slam_jax.rocket.tasks import Json

_WHAT = (
    "Variants of one model, trained alike on the same examples and tested on the same scenes. What "
    "differs is named; everything else is as in the first."
)
_DIFFERENCES = (
    "Percentage points from the first variant, paired, with intervals of 95% over scenes (2,000 "
    "resamplings) and seeds (Student's t); * marks those that are clear of 0, as by chance one in "
    "twenty is."
)
_SHORT = ("variant", "parameters", "all questions, %", "from the first, points")


def make_page(board: Json) -> Page:
    """The board in tables and plots."""
    rows = [row for row in board["rows"] if row["status"] == "ok"]
    failed = [f"{row['system']}: {row['reason']}" for row in board["rows"] if row["status"] != "ok"]
    sections: list[Table | Bullets | Plots] = [Bullets("Failed", failed)] if failed else []
    if rows:
        entries = [entry for entry in rows[0]["accuracy"] if entry != OVERALL]
        sections += [
            Table("Variants", _COLUMNS, [_cells(row) for row in rows], "", True, _SHORT),
            Table(
                "By kind of question, % right",
                ("variant", *entries),
                [(row["system"], *(_share(row["accuracy"][e]) for e in entries)) for row in rows],
                "needs both: questions that nobody can answer from one half of a split scene "
                "alone; only: the same questions, given one half.",
                True,
            ),
            Table(
                "By kind of question, points from the first variant",
                ("variant", *entries),
                [
                    (row["system"], *(_points(row["difference"][entry]) for entry in entries))
                    for row in rows
                    if row["difference"] is not None
                ],
                _DIFFERENCES,
            ),
            Plots(
                "All questions",
                {
                    "% right, mean over seeds": plot_bars(
                        {row["system"]: 100 * row["accuracy"][OVERALL]["mean"] for row in rows}
                    )
                },
            ),
            _seeds(rows),
        ]
    sections.append(winners_table(board))
    return Page("Rocket Engine: ablation", [_WHAT, describe(board)], sections)


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
        f"seeds. {describe_machine_of(board)}"
    )


_COLUMNS = (
    "variant",
    "all questions, %",
    "from the first, points",
    "changes",
    "parameters",
    "encoder, MFLOP a scene",
    "all, MFLOP a scene",
)


def _cells(row: Json) -> tuple[str, ...]:
    difference, flops = row["difference"], list(row["flops"].values())
    changes = ", ".join(
        f"{name.split('.')[-1]} {', '.join(to) if isinstance(to, list) else to}"
        for name, to in row["changes"].items()
    )
    return (
        row["system"],
        _share(row["accuracy"][OVERALL]),
        "" if difference is None else _points(difference[OVERALL]),
        changes or "none",
        f"{row['parameters']:,}",
        " / ".join(f"{each['encoder'] / 1e6:.2f}" for each in flops),
        " / ".join(f"{sum(each.values()) / 1e6:.2f}" for each in flops),
    )


def _share(interval: Json) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _points(interval: Json) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    clear = "" if low <= 0 <= high else " *"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}){clear}"


def _seeds(rows: list[Json]) -> Table:
    seeds = [run["seed"] for run in rows[0]["runs"]]
    cells = [
        (row["system"], *(f"{100 * run['accuracy'][OVERALL]:.1f}" for run in row["runs"]))
        for row in rows
    ]
    return Table("Seeds", ("variant", *(f"seed {s}" for s in seeds)), cells, "All questions, %.")
