"""The protocol `seed`: its tasks, its rows and its ranks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slam_jax.language_models import make_config
from slam_jax.rocket.board import Comparison, Results
from slam_jax.rocket.metrics import Metric, Part, add_scores, winners
from slam_jax.rocket.page import Page
from slam_jax.rocket.seed.measure import SeedSettings
from slam_jax.rocket.seed.page import make_page
from slam_jax.rocket.seed.published import PUBLISHED, TARGET_INFERENCE_MS, TARGET_SCORE
from slam_jax.rocket.tasks import Json, Task
from slam_jax.rocket.timing import spread

# The published categories, and those that were never measured.
WINNERS = {
    "loss reduction": Metric("loss_reduction"),
    "final accuracy": Metric("final_accuracy"),
    "perplexity": Metric("final_perplexity", least=True),
    "fastest inference": Metric("inference_ms", least=True),
    "most stable training": Metric("stability"),
    "smallest peak memory": Metric("peak_memory_bytes", least=True),
}
_AVERAGES = ("loss_reduction", "final_accuracy", "final_perplexity", "inference_ms")


def _loss_share(row: Json) -> float:
    return min(1.0, max(0.0, 1 - row["final_loss"] / row["initial_loss"]))


SCORE = {
    "loss": Part("30 x (1 - final loss / initial loss)", 30, _loss_share),
    "accuracy": Part("30 x final accuracy", 30, Metric("final_accuracy").of),
    "speed": Part(
        "20 x the fastest system's inference time / its own", 20, WINNERS["fastest inference"]
    ),
    "memory": Part("20 x the smallest peak memory / its own", 20, WINNERS["smallest peak memory"]),
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
        visits = range(1, self.options.rounds + 1)
        return [
            *self.each("updates", "seed"),
            *(task for i in visits for task in self.each(f"timing {i}", "seed_timing", 0.2)),
            *self.each("stress test", "seed_stress", 0.3, optional=True),
        ]

    def known(self, name: str) -> Json:
        return {"published": PUBLISHED[name]._asdict() if name in PUBLISHED else None}

    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        published, figures = PUBLISHED.get(name), done["updates"]
        losses, accuracies = figures["losses"], figures["accuracies"]
        visits = [done[f"timing {i}"]["seconds"] for i in range(1, self.options.rounds + 1)]
        inference = spread([second for visit in visits for second in visit])
        return {
            **figures,
            "initial_loss": losses[0],
            "final_loss": losses[-1],
            "loss_reduction": losses[0] - losses[-1],
            "initial_accuracy": accuracies[0],
            "final_accuracy": accuracies[-1],
            "initial_perplexity": math.exp(losses[0]),
            "final_perplexity": math.exp(losses[-1]),
            "inference": inference,
            "inference_ms": 1e3 * inference["median"],
            "inference_seconds": visits,
            "reaches_published_after": _reaches(losses, accuracies, published),
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
        def mean(key: str) -> float | None:
            return sum(row[key] for row in measured) / len(measured) if measured else None

        fast = [row["system"] for row in measured if row["inference_ms"] < TARGET_INFERENCE_MS]
        return {
            "targets": {"score_above": TARGET_SCORE, "inference_ms_below": TARGET_INFERENCE_MS},
            "statistics": {
                **{f"average_{key}": mean(key) for key in _AVERAGES},
                "success_rate": len(measured) / len(rows) if rows else None,
                "above_target_score": [r["system"] for r in measured if r["score"] > TARGET_SCORE],
                "below_target_inference": fast,
            },
        }

    def page(self, board: Json) -> Page:
        return make_page(board)


def _reaches(losses: Sequence[float], accuracies: Sequence[float], published: Any) -> int | None:
    """Updates after which loss and accuracy are as good as the published final ones."""
    for updates, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
        if published and loss <= published.final_loss and accuracy >= published.accuracy:
            return updates
    return None
