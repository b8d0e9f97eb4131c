"""The protocol `seed`: its tasks, its rows and its ranks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slam_jax.language_models import make_config
from slam_jax.rocket.board import Comparison
from slam_jax.rocket.machine import spread
from slam_jax.rocket.metrics import Metric, Part, add_scores, winners
from slam_jax.rocket.seed.measure import SeedSettings, learn, stress, time_inference
from slam_jax.rocket.seed.published import PUBLISHED, TARGETS
from slam_jax.rocket.tasks import Json, Results, Task

_INFERENCE = Metric("inference_ms", least=True)
_MEMORY = Metric("peak_memory_bytes", least=True)
# The published categories, and those that were never measured.
WINNERS = {
    "loss reduction": Metric("loss_reduction"),
    "final accuracy": Metric("final_accuracy"),
    "perplexity": Metric("final_perplexity", least=True),
    "fastest inference": _INFERENCE,
    "most stable training": Metric("stability"),
    "smallest peak memory": _MEMORY,
}
_AVERAGES = ("loss_reduction", "final_accuracy", "final_perplexity", "inference_ms")
SCORE = {
    "loss": Part(
        "30 x (1 - final loss / initial loss)",
        30,
        lambda row: float(np.clip(1 - row["final_loss"] / row["initial_loss"], 0, 1)),
    ),
    "accuracy": Part("30 x final accuracy", 30, Metric("final_accuracy").of),
    "speed": Part("20 x the fastest system's inference time / its own", 20, _INFERENCE),
    "memory": Part("20 x the smallest peak memory / its own", 20, _MEMORY),
}


class Seed(Comparison):
    """Each system learns in one process; then all are timed in turns; the stress test comes last,
    because a machine short of memory would distort the other measurements.

    Raises ConfigError for a system without the preset.
    """

    name, score = "seed", SCORE
    options: SeedSettings

    def __init__(self, options: SeedSettings, models: Sequence[str], workdir: str | Path = ""):
        super().__init__(options, models, workdir)
        for name in models:
            make_config(name, options.preset)

    def tasks(self, results: Results) -> list[Task]:
        return [
            *self.each("updates", learn),
            *self.visits(time_inference, 0.2),
            *self.each("stress test", stress, 0.3, optional=True),
        ]

    def known(self, name: str) -> Json:
        return {"published": PUBLISHED.get(name)}

    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        figures = done["updates"]
        losses, accuracies = figures["losses"], figures["accuracies"]
        visits = [visit["seconds"] for visit in self.timings(done)]
        inference = spread([second for visit in visits for second in visit])
        # The first update after which loss and accuracy are as good as the published final ones.
        goal = PUBLISHED.get(name, {"final_loss": -math.inf, "accuracy": 1.0})
        reached = [
            update
            for update, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
            if loss <= goal["final_loss"] and accuracy >= goal["accuracy"]
        ]
        return {
            **figures,
            "initial_loss": losses[0],
            "final_loss": losses[-1],
            "initial_accuracy": accuracies[0],
            "final_accuracy": accuracies[-1],
            "initial_perplexity": math.exp(losses[0]),
            "final_perplexity": math.exp(losses[-1]),
            "loss_reduction": losses[0] - losses[-1],
            "inference": inference,
            "inference_ms": 1e3 * inference["median"],
            "inference_seconds": visits,
            "reaches_published_after": reached[0] if reached else None,
            "stress": self._stress(done["stress test"]),
        }

    def _stress(self, done: Json) -> Json:
        """The levels that were tried, the largest that passed, and why it ended."""
        limit, levels = self.options.stress_seconds, done.get("levels", [])
        passed = [level for level in levels if level["seconds"] <= limit]
        slow = f"a forward pass took more than {limit:g} s"
        ended = slow if len(passed) < len(levels) else "the context is full"
        return {
            "levels": levels,
            "max_batch": max((level["batch_size"] for level in passed), default=0),
            "max_length": max((level["length"] for level in passed), default=0),
            "ended": done.get("reason") or ended,
        }

    def judge(self, rows: list[Json]) -> Json:
        add_scores(rows, self.score)
        rows.sort(key=lambda row: -row["score"])
        for row in rows:  # equal scores share a rank; there is one batch, and hence no interval
            row["rank"] = 1 + sum(other["score"] > row["score"] for other in rows)
        return winners(rows, WINNERS)

    def summary(self, rows: Sequence[Json], measured: Sequence[Json]) -> Json:
        good, fast = TARGETS["score_above"], TARGETS["inference_ms_below"]
        sums, count = {key: sum(row[key] for row in measured) for key in _AVERAGES}, len(measured)
        statistics = {
            **{f"average_{key}": sums[key] / count if count else None for key in _AVERAGES},
            "success_rate": len(measured) / len(rows) if rows else None,
            "above_target_score": [r["system"] for r in measured if r["score"] > good],
            "below_target_inference": [r["system"] for r in measured if r["inference_ms"] < fast],
        }
        return {"targets": TARGETS, "statistics": statistics}
