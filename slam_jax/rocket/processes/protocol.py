"""The protocol `processes`: its tasks, and its variants by the first endpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slam_jax.rocket.metrics import Metric, Ratio, interval, winners
from slam_jax.rocket.processes.measure import ProcessSettings, run
from slam_jax.rocket.sweep import TunedComparison
from slam_jax.rocket.tasks import Json, Results, Task
from slam_jax.training import Experiment

ENDPOINT = ("both streams", "nats")


class Processes(TunedComparison):
    """Each variant chooses its learning rate, is trained with each seed and scored.

    Rows are sorted by the first endpoint, the negative log-likelihood of the answers on scenes that
    are split between image and text. Every row has its paired differences to all other rows.
    """

    name = "processes"
    options: ProcessSettings

    def __init__(self, options: ProcessSettings, models: Sequence[str], workdir: str | Path):
        for name in models:
            Experiment.from_config(options.config_of(name, 0))
        self._folder = str(Path(workdir) / "runs")
        super().__init__(options, models, workdir)

    def tasks(self, results: Results) -> list[Task]:
        arguments = {"workdir": self._folder}
        return [
            *self.trials(results, run, 1.0, {**arguments, "trial": True}),
            *self.tuned(results, run, {**arguments, "trial": False}),
        ]

    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        runs = [{"seed": seed, **done[f"seed {seed}"]} for seed in self.options.seeds]
        figures = _figures(runs)
        errors = {
            condition: [run["conditions"][condition]["calibration_error"] for run in runs]
            for condition in runs[0]["conditions"]
        }
        return {
            "changes": dict(self.options.variants[name]),
            "parameters": runs[0]["parameters"],
            "flops": runs[0]["flops"],
            **self.tuning(done),
            "figures": {
                condition: {metric: interval(ratio) for metric, ratio in each.items()}
                for condition, each in figures.items()
            },
            "calibration_error": {name: float(np.mean(x)) for name, x in errors.items()},
            "runs": runs,
        }

    def judge(self, rows: list[Json]) -> Json:
        rows.sort(key=_endpoint.of)
        figures = {row["system"]: _figures(row["runs"]) for row in rows}
        for row in rows:
            own = figures[row["system"]]
            row["differences"] = {
                name: {
                    condition: {
                        metric: interval(ratio, other[condition][metric])
                        for metric, ratio in each.items()
                    }
                    for condition, each in own.items()
                }
                for name, other in figures.items()
                if name != row["system"]
            }
        paths = {
            f"{condition}, nats": ("figures", condition, "nats", "mean")
            for condition in rows[0]["figures"]
        }
        return winners(rows, {name: Metric(path, least=True) for name, path in paths.items()})


_endpoint = Metric(("figures", *ENDPOINT, "mean"), least=True)


def _figures(runs: Sequence[Json]) -> dict[str, dict[str, Ratio]]:
    """By condition, nats and right answers a question, over seeds and groups of scenes."""
    found: dict[str, dict[str, Ratio]] = {}
    for condition in runs[0]["conditions"]:
        sums = {
            what: np.array([run["conditions"][condition][what] for run in runs], np.float64)
            for what in ("nats", "right", "asked")
        }
        found[condition] = {what: Ratio(sums[what], sums["asked"]) for what in ("nats", "right")}
    return found
