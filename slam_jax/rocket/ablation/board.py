"""The board of an ablation: accuracy of each variant, and how it differs from the first."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from slam_jax.rocket.ablation.measure import AblationSettings
from slam_jax.rocket.board import Weights, head, interval, row_head, winner
from slam_jax.rocket.tasks import Json

# Of each seed (rows) and each scene (columns), by entry: how many were asked, how many were right.
_Counts = dict[str, tuple[Float[np.ndarray, "seeds scenes"], Float[np.ndarray, "seeds scenes"]]]
OVERALL = "all questions"


def make_board(
    about: Json, settings: AblationSettings, results: Mapping[str, Mapping[str, Json]]
) -> Json:
    """about: the head of the board, as the engine gives it. results: figures by variant and task;
    the first variant of the settings is what the others are compared with, if it was measured.
    """
    rows, first = [], None
    for name, done in results.items():
        row = row_head(name, done, done)
        if row["status"] == "ok":
            runs = [done[f"seed {seed}"] for seed in settings.seeds]
            counts = _counts(runs)
            is_first = name == next(iter(settings.variants))
            first = counts if is_first else first
            row |= {
                "changes": dict(settings.variants[name]),
                "parameters": runs[0]["parameters"],
                "flops": runs[0]["flops"],
                # Of several seeds all but one find their programs compiled.
                "peak_memory_bytes": min(run["peak_memory_bytes"] for run in runs),
                "accuracy": _accuracies(counts),
                "difference": None if is_first or first is None else _differences(counts, first),
                "runs": [
                    {"seed": seed, **run, "accuracy": _of_seed(counts, i)}
                    for i, (seed, run) in enumerate(zip(settings.seeds, runs, strict=True))
                ],
            }
        rows.append(row)
    measured = [row for row in rows if row["status"] == "ok"]
    entries = measured[0]["accuracy"] if measured else ()
    winners = {
        entry: winner(measured, lambda row, entry=entry: row["accuracy"][entry]["mean"], 1)
        for entry in entries
    }
    return {**head(about), "rows": rows, "category_winners": winners}


def _counts(runs: list[Json]) -> _Counts:
    """By entry, and under OVERALL those of all kinds of questions of all views."""
    found: Any = {
        entry: tuple(
            np.array([run["scores"][entry][what] for run in runs], np.float64)
            for what in ("right", "asked")
        )
        for entry in runs[0]["scores"]
    }
    kinds = [pair for entry, pair in found.items() if "/needs both" not in entry]
    right, asked = (np.sum(parts, axis=0) for parts in zip(*kinds, strict=True))
    return {OVERALL: (right, asked), **found}


def _shares(counts: _Counts, entry: str, weights: Weights) -> Float[np.ndarray, "_"]:
    right, asked = counts[entry]
    return (weights * right).sum((1, 2)) / (weights * asked).sum((1, 2))


def _accuracies(counts: _Counts) -> Json:
    found = {
        entry: interval(right.shape, lambda weights, entry=entry: _shares(counts, entry, weights))
        for entry, (right, _) in counts.items()
    }
    for each in found.values():  # no share is below none or above all
        each |= {"low": max(each["low"], 0.0), "high": min(each["high"], 1.0)}
    return found


def _differences(counts: _Counts, first: _Counts) -> Json:
    return {
        entry: interval(
            right.shape,
            lambda weights, entry=entry: (
                _shares(counts, entry, weights) - _shares(first, entry, weights)
            ),
        )
        for entry, (right, _) in counts.items()
    }


def _of_seed(counts: _Counts, seed: int) -> Json:
    return {
        entry: float(right[seed].sum() / asked[seed].sum())
        for entry, (right, asked) in counts.items()
    }
