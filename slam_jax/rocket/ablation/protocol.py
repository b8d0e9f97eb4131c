"""The protocol `ablation`: its tasks, accuracies and differences to the first variant."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slam_jax.errors import ConfigError, check_names
from slam_jax.rocket.ablation.measure import AblationSettings, run
from slam_jax.rocket.board import Comparison
from slam_jax.rocket.metrics import Metric, Ratio, interval, winners
from slam_jax.rocket.tasks import Json, Results, Task
from slam_jax.training import Experiment

OVERALL = "all questions"


class Ablation(Comparison):
    """Each variant is trained and tested with each seed.

    Raises ConfigError if there are no variants, or one of them cannot be built.
    """

    name, ranked = "ablation", False
    options: AblationSettings

    def __init__(self, options: AblationSettings, models: Sequence[str], workdir: str | Path):
        if not options.variants:
            raise ConfigError(
                "variants are not given; give --config a file of them, or the recipe "
                "ablations/sort_of_clevr"
            )
        check_names(models, list(options.variants), "variants")
        for name in options.variants:
            Experiment.from_config(options.config_of(name, 0))
        self._folder, self._first = Path(workdir) / "runs", next(iter(options.variants))
        # The first variant always runs: the others are compared with it.
        super().__init__(options, list(dict.fromkeys((self._first, *models))), workdir)

    def tasks(self, results: Results) -> list[Task]:
        given = {seed: {"workdir": str(self._folder), "seed": seed} for seed in self.options.seeds}
        return [
            task
            for seed, arguments in given.items()
            for task in self.each(f"seed {seed}", run, arguments=arguments, timed=False)
        ]

    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        runs = [{"seed": seed, **done[f"seed {seed}"]} for seed in self.options.seeds]
        shares = _shares(runs)
        accuracy = {entry: interval(share) for entry, share in shares.items()}
        for each in accuracy.values():
            each |= {"low": max(each["low"], 0.0), "high": min(each["high"], 1.0)}
        for i, each in enumerate(runs):
            each["accuracy"] = {entry: share.of_seeds()[i] for entry, share in shares.items()}
        return {
            "changes": dict(self.options.variants[name]),
            "parameters": runs[0]["parameters"],
            "flops": runs[0]["flops"],
            # The smallest, because all seeds but the first find their functions compiled.
            "peak_memory_bytes": min(each["peak_memory_bytes"] for each in runs),
            "accuracy": accuracy,
            "difference": None,
            "runs": runs,
        }

    def judge(self, rows: list[Json]) -> Json:
        if rows[0]["system"] == self._first:
            first = _shares(rows[0]["runs"])
            for row in rows[1:]:
                own = _shares(row["runs"])
                row["difference"] = {entry: interval(own[entry], first[entry]) for entry in own}
        entries = rows[0]["accuracy"]
        return winners(rows, {entry: Metric(("accuracy", entry, "mean")) for entry in entries})


def _shares(runs: Sequence[Json]) -> dict[str, Ratio]:
    """By entry ("view/kind"), right answers of asked questions; OVERALL has the questions of all
    kinds and views, each once."""

    def counts(entry: str, what: str) -> np.ndarray:
        return np.array([run["scores"][entry][what] for run in runs], np.float64)

    found = {e: Ratio(counts(e, "right"), counts(e, "asked")) for e in runs[0]["scores"]}
    # Questions that need both halves are counted in their kind already.
    kinds = [share for entry, share in found.items() if "/needs both" not in entry]
    above, below = (np.sum(parts, axis=0) for parts in zip(*kinds, strict=True))
    return {OVERALL: Ratio(above, below), **found}
