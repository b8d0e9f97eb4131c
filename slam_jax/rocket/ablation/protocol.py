"""The protocol `ablation`: its tasks, accuracies and differences to the first variant."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from slam_jax.errors import ConfigError, check_names
from slam_jax.rocket.ablation.measure import AblationSettings
from slam_jax.rocket.ablation.page import OVERALL, make_page
from slam_jax.rocket.board import Comparison, Results
from slam_jax.rocket.metrics import Metric, Weights, interval, winners
from slam_jax.rocket.page import Page
from slam_jax.rocket.tasks import Json, Task
from slam_jax.training import Experiment

# By entry ("view/kind"), how many questions were answered rightly and how many were asked.
_Counts = dict[str, tuple[Float[np.ndarray, "seeds scenes"], Float[np.ndarray, "seeds scenes"]]]


class Ablation(Comparison):
    """Each variant is trained and tested with each seed.

    Raises ConfigError if there are no variants, or one of them cannot be built.
    """

    name = "ablation"
    options: AblationSettings

    def __init__(self, options: AblationSettings, models: Sequence[str], workdir: str | Path):
        if not options.variants:
            raise ConfigError(
                "variants are not given; give --config a file of them, such as "
                "configs/ablations/sort_of_clevr.py"
            )
        check_names(models, list(options.variants), "variants")
        for name in options.variants:
            Experiment.from_config(options.config_of(name, 0))
        self._folder, self._first = Path(workdir) / "runs", next(iter(options.variants))
        # The first variant always runs: the others are compared with it.
        super().__init__(options, list(dict.fromkeys((self._first, *models))), workdir)

    def tasks(self, results: Results) -> list[Task]:
        seeds = self.options.seeds
        return [t for seed in seeds for t in self.each(f"seed {seed}", "ablation", timed=False)]

    def arguments(self, task: Task, done: Mapping[str, Json]) -> Json:
        seed = next(seed for seed in self.options.seeds if task.label == f"seed {seed}")
        return {"workdir": str(self._folder), "seed": seed}

    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        runs = [done[f"seed {seed}"] for seed in self.options.seeds]
        counts = _counts(runs)
        accuracy = _intervals(counts, lambda entry, weights: _share(counts, entry, weights))
        for each in accuracy.values():
            each |= {"low": max(each["low"], 0.0), "high": min(each["high"], 1.0)}
        seeds = [
            {
                entry: float(right[i].sum() / asked[i].sum())
                for entry, (right, asked) in counts.items()
            }
            for i in range(len(runs))
        ]
        return {
            "changes": dict(self.options.variants[name]),
            "parameters": runs[0]["parameters"],
            "flops": runs[0]["flops"],
            # The smallest, because all seeds but the first find their functions compiled.
            "peak_memory_bytes": min(run["peak_memory_bytes"] for run in runs),
            "accuracy": accuracy,
            "difference": None,
            "runs": [
                {"seed": seed, **run, "accuracy": shares}
                for seed, run, shares in zip(self.options.seeds, runs, seeds, strict=True)
            ],
        }

    def judge(self, rows: list[Json]) -> Json:
        if rows[0]["system"] == self._first:
            first = _counts(rows[0]["runs"])
            for row in rows[1:]:
                own = _counts(row["runs"])
                row["difference"] = _intervals(
                    own, lambda e, w, own=own: _share(own, e, w) - _share(first, e, w)
                )
        entries = rows[0]["accuracy"]
        return winners(rows, {entry: Metric(f"accuracy.{entry}.mean") for entry in entries})

    def page(self, board: Json) -> Page:
        return make_page(board)


def _counts(runs: Sequence[Json]) -> _Counts:
    """By entry; OVERALL has the questions of all kinds and views, each once."""
    found: _Counts = {}
    for entry in runs[0]["scores"]:
        right, asked = (
            np.array([run["scores"][entry][what] for run in runs], np.float64)
            for what in ("right", "asked")
        )
        found[entry] = (right, asked)
    # Questions that need both halves are counted in their kind already.
    kinds = [pair for entry, pair in found.items() if "/needs both" not in entry]
    right, asked = (np.sum(parts, axis=0) for parts in zip(*kinds, strict=True))
    return {OVERALL: (right, asked), **found}


def _share(counts: _Counts, entry: str, weights: Weights) -> Float[np.ndarray, "_"]:
    right, asked = counts[entry]
    return (weights * right).sum((1, 2)) / (weights * asked).sum((1, 2))


def _intervals(
    counts: _Counts, figure: Callable[[str, Weights], Float[np.ndarray, "_"]]
) -> dict[str, Json]:
    return {
        entry: interval(right.shape, lambda weights, entry=entry: figure(entry, weights))
        for entry, (right, _) in counts.items()
    }
