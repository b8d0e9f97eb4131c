"""The leaderboard of the held-out comparison: intervals over documents, ranks with ties."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slam_jax.rocket.board import head, interval, resamplings, row_head, winner
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

    def metric(self, name: str, weights: Float[np.ndarray, "R seeds documents"]) -> np.ndarray:
        """One of METRICS, of every resampling."""
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
        _judge(measured, scores, len(settings.seeds))
        measured.sort(key=lambda row: row["bits_per_byte"]["mean"])
        _rank(measured, scores, len(settings.seeds))
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


def _judge(rows: list[Json], scores: Mapping[str, _Scores], seeds: int) -> None:
    """Every metric with its 95% interval."""
    for row in rows:
        own = scores[row["system"]]
        weights = resamplings(seeds, own.nats.shape[1])
        for name in METRICS:
            mean = float(own.metric(name, np.ones((1, *own.nats.shape)))[0])
            row[name] = interval(mean, own.metric(name, weights))


def _rank(rows: list[Json], scores: Mapping[str, _Scores], seeds: int) -> None:
    """rows: the best first. One whose difference from the row above is not clear of 0 has its
    rank."""
    for place, row in enumerate(rows):
        row["rank"], row["difference_from_above"] = place + 1, None
        if not place:
            continue
        above, own = scores[rows[place - 1]["system"]], scores[row["system"]]
        weights = resamplings(seeds, own.nats.shape[1])
        differences = own.metric("bits_per_byte", weights) - above.metric("bits_per_byte", weights)
        mean = row["bits_per_byte"]["mean"] - rows[place - 1]["bits_per_byte"]["mean"]
        row["difference_from_above"] = interval(mean, differences)
        if row["difference_from_above"]["low"] <= 0:
            row["rank"] = rows[place - 1]["rank"]


def _tuning(done: Mapping[str, Json], settings: HeldoutSettings) -> Json:
    """The rate that was used, what each led to, and whether a rate beyond might be better."""
    losses = validation_losses(done, settings)
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
    edges = (min(settings.learning_rates), max(settings.learning_rates))
    return {"learning_rate": rate, "learning_rate_is_at_edge": rate in edges, "tried": tried}


def _cost(done: Mapping[str, Json], settings: HeldoutSettings) -> Json:
    """Times of all visits, in turns; memory and compiling of the process that took most."""
    visits = [done[f"timing {visit}"] for visit in range(1, settings.rounds + 1)]

    def seconds(what: str) -> list[float]:
        return [second for visit in visits for second in visit["seconds"][what]]

    tokens = settings.batch_size * settings.length

    def decoding(batch_size: int) -> list[float]:
        """Seconds of the tokens after the first."""
        pairs = zip(
            seconds(f"generation_{batch_size}"), seconds(f"first_token_{batch_size}"), strict=True
        )
        return [whole - first for whole, first in pairs]

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
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
    }


def _rates(amount: int, seconds: list[float]) -> Json:
    return Timing.of([amount / max(each, 1e-9) for each in seconds]).as_json()


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
        "bits per byte": winner(measured, lambda row: row["bits_per_byte"]["mean"], -1),
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
