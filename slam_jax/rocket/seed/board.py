"""The leaderboard of the `seed` protocol: rows from figures, a score, ranks, winners."""

import math
from collections.abc import Mapping
from typing import Any

from slam_jax.rocket.board import head, row_head, winner
from slam_jax.rocket.seed.measure import SeedSettings
from slam_jax.rocket.seed.published import PUBLISHED, TARGET_INFERENCE_MS, TARGET_SCORE
from slam_jax.rocket.tasks import Json
from slam_jax.rocket.timing import Timing

# Of 100 points. Each part is linear between none and all of it, and the same for every row.
SCORE_RULE = {
    "loss": "30 x (1 - final loss / initial loss)",
    "accuracy": "30 x final accuracy",
    "speed": "20 x the fastest system's inference time / its own",
    "memory": "20 x the smallest peak memory / its own",
}


def make_board(
    about: Json, settings: SeedSettings, results: Mapping[str, Mapping[str, Json]]
) -> Json:
    """about: the head of the board, as the engine gives it. results: figures by system and task."""
    rows = [_row(name, done, settings) for name, done in results.items()]
    measured = [row for row in rows if row["status"] == "ok"]
    for row in measured:
        row["score_parts"] = _score_parts(row, measured)
        row["score"] = sum(row["score_parts"].values())
    measured.sort(key=lambda row: -row["score"])
    for row in measured:
        # Equal scores share a rank; there is one batch, and hence no interval.
        row["rank"] = 1 + sum(other["score"] > row["score"] for other in measured)
    rows = measured + [row for row in rows if row["status"] != "ok"]
    return {
        **head(about),
        "score_rule": SCORE_RULE,
        "targets": {"score_above": TARGET_SCORE, "inference_ms_below": TARGET_INFERENCE_MS},
        "rows": rows,
        "category_winners": _winners(measured),
        "statistics": _statistics(rows, measured),
    }


def _row(name: str, done: Mapping[str, Json], settings: SeedSettings) -> Json:
    published = PUBLISHED.get(name)
    row = row_head(name, done, [label for label in done if label != "stress test"])
    row["published"] = None if published is None else dict(published._asdict())
    if row["status"] == "failed":
        return row
    figures, stress = done["updates"], done["stress test"]
    losses, accuracies = figures["losses"], figures["accuracies"]
    visits = [done[f"timing {visit}"]["seconds"] for visit in range(1, settings.rounds + 1)]
    timing = Timing.of([second for visit in visits for second in visit])
    return {
        **row,
        **figures,
        "initial_loss": losses[0],
        "final_loss": losses[-1],
        "loss_reduction": losses[0] - losses[-1],
        "initial_accuracy": accuracies[0],
        "final_accuracy": accuracies[-1],
        "initial_perplexity": math.exp(losses[0]),
        "final_perplexity": math.exp(losses[-1]),
        "inference": timing.as_json(),
        "inference_ms": 1e3 * timing.median,
        "inference_seconds": visits,
        "reaches_published_after": _reaches(losses, accuracies, published),
        "stress": _stress(stress, settings),
    }


def _stress(done: Json, settings: SeedSettings) -> Json:
    """What was tried, the largest that passed, and why it went no further."""
    levels = done.get("levels", [])
    passed = [level for level in levels if level["seconds"] <= settings.stress_seconds]
    slow = f"a forward pass took more than {settings.stress_seconds:g} s"
    ended = done.get("reason") or (slow if len(passed) < len(levels) else "the context is full")
    return {
        "levels": levels,
        "max_batch": max((level["batch_size"] for level in passed), default=0),
        "max_length": max((level["length"] for level in passed), default=0),
        "ended": ended,
    }


def _reaches(losses: list[float], accuracies: list[float], published: Any) -> int | None:
    """Updates after which loss and accuracy are as good as the published final ones."""
    if published is None:
        return None
    for updates, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
        if loss <= published.final_loss and accuracy >= published.accuracy:
            return updates
    return None


def _score_parts(row: Json, measured: list[Json]) -> dict[str, float]:
    fastest = min(other["inference_ms"] for other in measured)
    smallest = min(other["peak_memory_bytes"] for other in measured)
    return {
        "loss": 30 * min(1.0, max(0.0, 1 - row["final_loss"] / row["initial_loss"])),
        "accuracy": 30 * row["final_accuracy"],
        "speed": 20 * fastest / row["inference_ms"],
        "memory": 20 * smallest / row["peak_memory_bytes"],
    }


def _winners(measured: list[Json]) -> Json:
    """The published categories, and those that were never measured."""
    if not measured:
        return {}

    def best(key: str, sign: int) -> Json:
        return winner(measured, lambda row: row[key], sign)

    return {
        "loss reduction": best("loss_reduction", 1),
        "final accuracy": best("final_accuracy", 1),
        "perplexity": best("final_perplexity", -1),
        "fastest inference": best("inference_ms", -1),
        "most stable training": best("stability", 1),
        "smallest peak memory": best("peak_memory_bytes", -1),
    }


def _statistics(rows: list[Json], measured: list[Json]) -> Json:
    def mean(key: str) -> float | None:
        return sum(row[key] for row in measured) / len(measured) if measured else None

    keys = ("loss_reduction", "final_accuracy", "final_perplexity", "inference_ms")
    return {
        **{f"average_{key}": mean(key) for key in keys},
        "success_rate": len(measured) / len(rows) if rows else None,
        "above_target_score": [r["system"] for r in measured if r["score"] > TARGET_SCORE],
        "below_target_inference": [
            r["system"] for r in measured if r["inference_ms"] < TARGET_INFERENCE_MS
        ],
    }
