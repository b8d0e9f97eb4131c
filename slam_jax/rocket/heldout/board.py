"""The leaderboard of the held-out comparison: intervals over documents, ranks with ties."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slam_jax.rocket.board import Weights, head, interval, row_head, winner
from slam_jax.rocket.heldout.measure import (
    HeldoutSettings,
    choose_learning_rate,
    rate_label,
    seed_label,
    validation_losses,
)
from slam_jax.rocket.tasks import Json
from slam_jax.rocket.timing import Timing

# Of 100 points; ranks go by bits per byte alone, since speed and memory are of one machine.
SCORE_RULE = {
    "quality": "70 x the lowest held-out bits per byte / its own",
    "training": "10 x its training tokens per second / the fastest system's",
    "generation": "10 x its generated tokens per second / the fastest system's",
    "memory": "10 x the smallest peak memory / its own",
}
METRICS = ("loss", "bits_per_byte", "top1", "top5")


class _Scores(NamedTuple):
    """Sums of each seed (rows) over each test document (columns)."""

    nats: Float[np.ndarray, "seeds documents"]
    top1: Float[np.ndarray, "seeds documents"]
    top5: Float[np.ndarray, "seeds documents"]
    tokens: Float[np.ndarray, "seeds documents"]
    bytes: Float[np.ndarray, "seeds documents"]

    def metric(self, name: str, weights: Weights) -> Float[np.ndarray, "_"]:
        """One of METRICS, by each of the weights."""
        above, below = {
            "loss": (self.nats, self.tokens),
            "bits_per_byte": (self.nats / math.log(2), self.bytes),
            "top1": (self.top1, self.tokens),
            "top5": (self.top5, self.tokens),
        }[name]
        return np.sum(weights * above, axis=(1, 2)) / np.sum(weights * below, axis=(1, 2))


def make_board(
    about: Json,
    settings: HeldoutSettings,
    sizes: Mapping[str, Json],
    results: Mapping[str, Mapping[str, Json]],
) -> Json:
    """about: the head of the board, as the engine gives it. sizes: of `measure.size`. results:
    figures by system and task."""
    rows, scores = [], {}
    for name, done in results.items():
        row = row_head(name, done, [label for label in done if "learning rate" not in label])
        if row["status"] == "ok":
            runs = [done[seed_label(seed)] for seed in settings.seeds]
            scores[name] = _Scores(
                *(np.array([run["test"][field] for run in runs]) for field in _Scores._fields)
            )
            row |= {**sizes[name], **_tuning(done, settings), **_cost(done, settings)}
            row["runs"] = [
                {"seed": seed, **_summary(scores[name], i), **run}
                for i, (seed, run) in enumerate(zip(settings.seeds, runs, strict=True))
            ]
            row["stability"] = float(np.mean([run["stability"] for run in runs]))
        rows.append(row)
    measured = [row for row in rows if row["status"] == "ok"]
    if measured:
        _judge(measured, scores)
        measured.sort(key=lambda row: row["bits_per_byte"]["mean"])
        _rank(measured, scores)
    for row in measured:
        row["score_parts"] = _score_parts(row, measured)
        row["score"] = sum(row["score_parts"].values())
    return {
        **head(about),
        "score_rule": SCORE_RULE,
        "rows": measured + [row for row in rows if row["status"] != "ok"],
        "category_winners": _winners(measured),
    }


def _summary(scores: _Scores, seed: int) -> Json:
    weights = np.zeros((1, *scores.nats.shape))
    weights[:, seed] = 1
    return {name: float(scores.metric(name, weights)[0]) for name in METRICS}


def _judge(rows: list[Json], scores: Mapping[str, _Scores]) -> None:
    """Every metric with its 95% interval."""
    for row, name in itertools.product(rows, METRICS):
        own = scores[row["system"]]
        row[name] = interval(own.nats.shape, lambda weights, o=own, n=name: o.metric(n, weights))


def _rank(rows: list[Json], scores: Mapping[str, _Scores]) -> None:
    """rows: the best first. One whose difference from the row above is not clear of 0 has its
    rank. Each has its differences from all above it."""
    for place, row in enumerate(rows):
        own = scores[row["system"]]
        row["differences"] = {
            better["system"]: interval(
                own.nats.shape,
                lambda weights, a=own, b=scores[better["system"]]: (
                    a.metric("bits_per_byte", weights) - b.metric("bits_per_byte", weights)
                ),
            )
            for better in rows[:place]
        }
        row["rank"], row["difference_from_above"] = place + 1, None
        if place:
            above = rows[place - 1]
            row["difference_from_above"] = row["differences"][above["system"]]
            if row["difference_from_above"]["low"] <= 0:
                row["rank"] = above["rank"]


def _tuning(done: Mapping[str, Json], settings: HeldoutSettings) -> Json:
    """The rate that was used, what each led to, and whether a rate beyond might be better."""
    losses = validation_losses(done, settings)
    edges = (min(losses), max(losses))
    rate = choose_learning_rate(losses)
    assert rate is not None  # or there would be no run
    tried = [
        {
            "learning_rate": each,
            "validation_loss": loss,
            "reason": done[rate_label(each)].get("reason"),
        }
        for each, loss in losses.items()
    ]
    return {"learning_rate": rate, "learning_rate_is_at_edge": rate in edges, "tried": tried}


def _cost(done: Mapping[str, Json], settings: HeldoutSettings) -> Json:
    """Times of all visits, in turns; memory of the process that took least, for which another had
    compiled the programs."""
    visits = [done[f"timing {visit}"] for visit in range(1, settings.rounds + 1)]

    def seconds(what: str) -> list[float]:
        return [second for visit in visits for second in visit["seconds"][what]]

    tokens = settings.batch_size * settings.length

    def decoding(batch_size: int) -> list[float]:
        """Seconds of the tokens after the first."""
        both = seconds(f"generation_{batch_size}"), seconds(f"first_token_{batch_size}")
        pairs = list(zip(*both, strict=True))
        # Of a pair whose shorter one was held up nothing is known; of none but such, a bound.
        known = [whole - first for whole, first in pairs if whole > first]
        return known or [whole for whole, _ in pairs]

    runs = [done[seed_label(seed)] for seed in settings.seeds]
    return {
        "training_tokens_per_second": _rates(tokens, seconds("training_step")),
        "generation_tokens_per_second": {
            str(n): _rates(n * settings.new_tokens, decoding(n)) for n in (1, 8)
        },
        "first_token_seconds": {
            str(n): Timing.of(seconds(f"first_token_{n}")).as_json() for n in (1, 8)
        },
        "compile_seconds": Timing.of([visit["compile_seconds"] for visit in visits]).as_json(),
        "peak_memory_bytes": min(run["peak_memory_bytes"] for run in runs),
    }


def _rates(amount: int, seconds: list[float]) -> Json:
    return Timing.of([amount / each for each in seconds]).as_json()


def _score_parts(row: Json, measured: list[Json]) -> dict[str, float]:
    bits, memory = row["bits_per_byte"]["mean"], row["peak_memory_bytes"]
    trained = row["training_tokens_per_second"]["median"]
    generated = row["generation_tokens_per_second"]["8"]["median"]
    return {
        "quality": 70 * min(r["bits_per_byte"]["mean"] for r in measured) / bits,
        "training": 10 * trained / max(r["training_tokens_per_second"]["median"] for r in measured),
        "generation": 10
        * generated
        / max(r["generation_tokens_per_second"]["8"]["median"] for r in measured),
        "memory": 10 * min(r["peak_memory_bytes"] for r in measured) / memory,
    }


def _winners(measured: list[Json]) -> Json:
    if not measured:
        return {}
    speed = "generation_tokens_per_second"
    return {
        # All of the first rank: which of them is best, the intervals cannot tell.
        "bits per byte": {
            "system": ", ".join(row["system"] for row in measured if row["rank"] == 1),
            "value": measured[0]["bits_per_byte"]["mean"],
        },
        "top-1": winner(measured, lambda row: row["top1"]["mean"], 1),
        "training, tokens/s": winner(
            measured, lambda row: row["training_tokens_per_second"]["median"], 1
        ),
        "generation, tokens/s": winner(measured, lambda row: row[speed]["8"]["median"], 1),
        "first token, ms": winner(
            measured, lambda row: 1e3 * row["first_token_seconds"]["1"]["median"], -1
        ),
        "peak memory, GiB": winner(measured, lambda row: row["peak_memory_bytes"] / 2**30, -1),
        "cache, bytes a token": winner(measured, lambda row: row["cache_bytes_per_token"], -1),
    }
