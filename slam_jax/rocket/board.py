"""The leaderboard of the `seed` protocol: rows from figures, a score, ranks, winners."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slam_jax.errors import InputError, write_whole
from slam_jax.language_models import SYSTEMS
from slam_jax.rocket.published import PUBLISHED, TARGET_INFERENCE_MS, TARGET_SCORE
from slam_jax.rocket.timing import Timing

SCHEMA_VERSION = 1
Json = dict[str, Any]

# Of 100 points. Each part is linear between none and all of it, and the same for every row.
SCORE_RULE = {
    "loss": "30 x (1 - final loss / initial loss)",
    "accuracy": "30 x final accuracy",
    "speed": "20 x the fastest system's inference time / its own",
    "memory": "20 x the smallest peak memory / its own",
}


def make_board(settings: Json, machine: Json, results: Mapping[str, Json]) -> Json:
    """results: of each system "figures" and "timings", or "reason" where there are none."""
    rows = [_row(name, result) for name, result in results.items()]
    measured = [row for row in rows if row["status"] == "ok"]
    for row in measured:
        row["score_parts"] = _score_parts(row, measured)
        row["score"] = sum(row["score_parts"].values())
    measured.sort(key=lambda row: -row["score"])
    for rank, row in enumerate(measured, 1):
        row["rank"] = rank
    rows = measured + [row for row in rows if row["status"] != "ok"]
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol": "seed",
        "settings": settings,
        "machine": machine,
        "score_rule": SCORE_RULE,
        "targets": {"score_above": TARGET_SCORE, "inference_ms_below": TARGET_INFERENCE_MS},
        "rows": rows,
        "category_winners": _winners(measured),
        "statistics": _statistics(rows, measured),
    }


def _row(name: str, result: Json) -> Json:
    published = PUBLISHED.get(name)
    row: Json = {
        "system": name,
        "title": SYSTEMS[name].title,
        "published": None if published is None else dict(published._asdict()),
        "status": "failed" if "reason" in result else "ok",
    }
    if "reason" in result:
        return {**row, "reason": result["reason"]}
    figures = result["figures"]
    losses, accuracies = figures["losses"], figures["accuracies"]
    timing = Timing.of([second for visit in result["timings"] for second in visit["seconds"]])
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
        "reaches_published_after": _reaches(losses, accuracies, published),
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
        row = max(measured, key=lambda row: sign * row[key])
        return {"system": row["system"], "value": row[key]}

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


def write_board(board: Json, workdir: Path) -> None:
    """As leaderboard.json, and under the name of the published file."""
    text = json.dumps(board, indent=2, allow_nan=False) + "\n"
    for name in ("leaderboard.json", "comprehensive_model_results.json"):
        write_whole(workdir / name, text)


def read_results(path: Path, settings: Json) -> dict[str, Json]:
    """What an earlier run of the same settings has measured already, none where there was none.

    Raises InputError where it was of other settings.
    """
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        results = dict(kept["results"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what a leaderboard keeps ({error}); delete it") from None
    if kept.get("settings") != settings:
        raise InputError(f"{path}: is of other settings; give another --workdir, or delete it")
    return results
