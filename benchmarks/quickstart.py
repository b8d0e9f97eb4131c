"""Publishes evaluated runs of the quickstart in docs/results.md.

    python -m benchmarks.quickstart --date=2026-11-29 --machine="AMD EPYC, 1 of 2 cores" DIR DIR ..

The runs have one config and different seeds. The tables of a single run are of the one with the
median accuracy on relational questions about images, the lower one where two are in the middle.
Prints the lowest accuracies of all runs, and the table of the README.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import results_page
from benchmarks.results import FOLDER
from slam_jax.errors import InputError, write_whole
from slam_jax.runtime import cli
from slam_jax.version import __version__

DATE = flags.DEFINE_string("date", None, "Of the runs.", required=True)
MACHINE = flags.DEFINE_string("machine", None, "And how it was used.", required=True)
FILE = FOLDER / "quickstart.json"
VIEWS = ("image", "aux", "text", "image_text", "split_image_text", "split_image_aux")
KINDS = ("non_relational", "relational")
Json = dict[str, Any]


def main(workdirs: list[str]) -> None:
    runs = {}
    for workdir in map(Path, workdirs):
        metrics = json.loads((workdir / "eval" / "metrics.json").read_text())
        config = workdir / "checkpoints" / str(metrics["step"]) / "config.json"
        runs[json.loads(config.read_text())["seed"]] = metrics["views"], metrics["retrieval"]
    if len(runs) != len(workdirs) or not runs:
        raise InputError("expected workdirs of runs with different seeds")
    order = sorted(runs, key=lambda seed: runs[seed][0]["image"]["relational"]["accuracy"])
    median = order[(len(order) - 1) // 2]
    found = json.loads(FILE.read_text())
    found["tables"] = publish(found["tables"], runs, median)
    write_whole(FILE, json.dumps(found, indent=1) + "\n")
    results_page.write()
    for kind in KINDS:
        image, others = (
            min(views[view][kind]["accuracy"] for views, _ in runs.values() for view in some)
            for some in (VIEWS[:1], VIEWS[1:])
        )
        print(f"lowest of {len(runs)} runs, {kind}: image {image:.1%}, other views {others:.1%}")
    print(f"median run: seed {median}")
    for view in VIEWS:
        print(f"| `{view}` | {' | '.join(both(runs[median][0], view).split(' / '))} |")


def publish(tables: list[Json], runs: dict[int, Any], median: int) -> list[Json]:
    """The tables with the runs of this version in place of earlier ones, and those of one run."""
    everything, _, needs_both, retrieval, *rest = tables
    others = [row for row in everything["rows"] if row[-2] != __version__]
    columns = everything["columns"][1:-4]
    rows = [
        ["", *(both(views, view) for view in columns), str(seed), MACHINE.value, __version__]
        for seed, (views, _) in runs.items()
    ]
    everything["rows"] = [[*row, DATE.value] for row in rows] + others
    views, ranks = runs[median]
    which = "median" if len(runs) % 2 else "lower median"
    accuracies = {
        "title": f"The {which} of {len(runs)} runs (seed {median}), % right with 95% intervals",
        "columns": ["view", "questions", "% right"],
        "note": "Intervals by bootstrap over the 200 test scenes, 2,000 questions of each kind.",
        "rows": [
            [view, kind.replace("_", "-"), interval(views[view][kind])]
            for view in VIEWS
            for kind in KINDS
        ],
    }
    needs_both["title"] = needs_both["title"].split(" (seed")[0] + f" (seed {median})"
    needs_both["rows"] = [
        [view, kind.removeprefix("needs_both_").replace("_", " "), interval(score)]
        for view in VIEWS
        for kind, score in views[view].items()
        if kind not in KINDS
    ]
    retrieval["title"] = retrieval["title"].split(" (seed")[0] + f" (seed {median})"
    retrieval["rows"] = [
        [name.replace("_", " "), *(f"{100 * ranks[name][f'recall@{k}']:.1f}" for k in (1, 5))]
        for name in ("text_to_image", "image_to_text")
    ]
    for table in (accuracies, needs_both, retrieval):
        table.update(machine=MACHINE.value, version=__version__, date=DATE.value)
    return [everything, accuracies, needs_both, retrieval, *rest]


def both(views: Json, view: str) -> str:
    return " / ".join(f"{100 * views[view][kind]['accuracy']:.1f}" for kind in KINDS)


def interval(score: Json) -> str:
    low, middle, high = (f"{100 * score[name]:.1f}" for name in ("low", "accuracy", "high"))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    cli.run(main)
