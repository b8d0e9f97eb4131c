"""The protocol `heldout`: its tasks, its rows and its ranks.

This comparison can rank architectures: real text, held-out documents, equal budgets. Every system
has the width at which it meets one budget, reads the same tokens in the same order, and uses the
learning rate that the validation documents choose. It is then trained with several seeds and
predicts the test documents.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from slam_jax.errors import InputError
from slam_jax.rocket.board import Comparison, Results
from slam_jax.rocket.heldout.corpus import load_corpus, make_corpus, save_corpus
from slam_jax.rocket.heldout.measure import size
from slam_jax.rocket.heldout.page import make_page
from slam_jax.rocket.heldout.rates import (
    choose_learning_rate,
    rate_label,
    rates_to_try,
    validation_losses,
)
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.metrics import Metric, Part, Weights, add_scores, interval, winners
from slam_jax.rocket.page import Page
from slam_jax.rocket.tasks import Impossible, Json, Task
from slam_jax.rocket.timing import spread

TRAINING = Metric("training_tokens_per_second.median")
GENERATION = Metric("generation_tokens_per_second.8.median")
MEMORY = Metric("peak_memory_bytes", least=True)
WINNERS = {
    "top-1": Metric("top1.mean"),
    "training, tokens/s": TRAINING,
    "generation, tokens/s": GENERATION,
    "first token, ms": Metric("first_token_seconds.1.median", least=True, scale=1e3),
    "peak memory, GiB": Metric("peak_memory_bytes", least=True, scale=2**-30),
    "cache, bytes a token": Metric("cache_bytes_per_token", least=True),
}
# Ranks are by bits per byte alone, because speed and memory depend on the machine.
SCORE = {
    "quality": Part(
        "70 x the lowest held-out bits per byte / its own",
        70,
        Metric("bits_per_byte.mean", least=True),
    ),
    "training": Part("10 x its training tokens per second / the fastest system's", 10, TRAINING),
    "generation": Part(
        "10 x its generated tokens per second / the fastest system's", 10, GENERATION
    ),
    "memory": Part("10 x the smallest peak memory / its own", 10, MEMORY),
}
# Sums over the test documents: each metric is the first divided by the second.
METRICS = {
    "loss": ("nats", "tokens"),
    "bits_per_byte": ("bits", "bytes"),
    "top1": ("top1", "tokens"),
    "top5": ("top5", "tokens"),
}
_Scores = Mapping[str, Float[np.ndarray, "seeds documents"]]


class Heldout(Comparison):
    """Learning rates are tried for all systems, then all are trained with each seed, then timed.

    The text is read and split once for a workdir, and stored there.

    Raises: DataError if it cannot be read; InputError if the stored text is another; ConfigError if
    a budget cannot be met.
    """

    name, score = "heldout", SCORE
    options: HeldoutSettings

    def __init__(self, options: HeldoutSettings, models: Sequence[str], workdir: str | Path):
        super().__init__(options, models, workdir)
        self._folder = Path(workdir) / "corpus"
        asked = {"text": options.text, "vocab_size": options.vocab_size}
        if not self._folder.exists():
            save_corpus(make_corpus(**asked), self._folder)
        self.data = load_corpus(self._folder).about
        if self.data.get("asked") != asked:
            raise InputError(
                f"{self._folder}: holds {self.data.get('asked')}, but {asked} is asked for; give "
                "another --workdir, or delete this one"
            )
        # Before anything is trained, so that a budget that cannot be met fails at once.
        self._sizes = {name: size(name, options, self.data["vocab_size"]) for name in models}

    def tasks(self, results: Results) -> list[Task]:
        settings = self.options
        share = settings.sweep_tokens / settings.num_tokens
        rates = {name: rates_to_try(results.get(name, {}), settings) for name in self.models}
        tried = [
            Task(name, rate_label(rates[name][i]), "heldout", share, optional=True, timed=False)
            for i in range(max(map(len, rates.values())))
            for name in self.models
            if i < len(rates[name])
        ]
        visits = range(1, settings.rounds + 1)
        return [
            *tried,
            *(t for s in settings.seeds for t in self.each(f"seed {s}", "heldout", timed=False)),
            *(task for i in visits for task in self.each(f"timing {i}", "heldout_timing", 0.1)),
        ]

    def arguments(self, task: Task, done: Mapping[str, Json]) -> Json:
        settings, corpus = self.options, {"corpus": str(self._folder)}
        if task.what == "heldout_timing":
            return corpus
        for rate in rates_to_try(done, settings):
            if task.label == rate_label(rate):
                budget = {"num_tokens": settings.sweep_tokens, "test": False}
                return {**corpus, **budget, "learning_rate": rate, "seed": settings.seeds[0]}
        rate = choose_learning_rate(validation_losses(done, settings))
        if rate is None:
            reasons = [done[rate_label(rate)].get("reason") for rate in settings.learning_rates]
            raise Impossible(f"no learning rate could be tried: {reasons[0]}")
        seed = next(seed for seed in settings.seeds if task.label == f"seed {seed}")
        budget = {"num_tokens": settings.num_tokens, "test": True}
        return {**corpus, **budget, "learning_rate": rate, "seed": seed}

    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        runs = [{"seed": seed, **done[f"seed {seed}"]} for seed in self.options.seeds]
        scores = _scores(runs)
        for run, only in zip(runs, np.eye(len(runs)), strict=True):
            weights = np.broadcast_to(only[None, :, None], (1, *scores["nats"].shape))
            run |= {metric: float(_metric(scores, metric, weights)[0]) for metric in METRICS}
        return {
            **self._sizes[name],
            **self._tuning(done),
            **self._cost(done, runs),
            "runs": runs,
            "stability": float(np.mean([run["stability"] for run in runs])),
            **{
                metric: interval(
                    scores["nats"].shape, lambda w, metric=metric: _metric(scores, metric, w)
                )
                for metric in METRICS
            },
        }

    def _tuning(self, done: Mapping[str, Json]) -> Json:
        """The learning rate, whether a rate beyond might be better, and what was tried."""
        losses = validation_losses(done, self.options)
        rate = choose_learning_rate(losses)
        assert rate is not None  # else there would be no run
        tried = [
            {
                "learning_rate": each,
                "validation_loss": loss,
                "reason": done[rate_label(each)].get("reason"),
            }
            for each, loss in losses.items()
        ]
        at_edge = rate in (min(losses), max(losses))
        return {"learning_rate": rate, "learning_rate_is_at_edge": at_edge, "tried": tried}

    def _cost(self, done: Mapping[str, Json], runs: Sequence[Json]) -> Json:
        """Times of all visits, and the smallest peak memory: that of a process which found its
        functions compiled."""
        settings = self.options
        visits = [done[f"timing {i}"] for i in range(1, settings.rounds + 1)]

        def seconds(what: str) -> list[float]:
            return [second for visit in visits for second in visit["seconds"][what]]

        def after_first(n: int) -> list[float]:
            """Seconds of the tokens after the first, at a batch of n."""
            pairs = list(zip(seconds(f"generation_{n}"), seconds(f"first_token_{n}"), strict=True))
            # If a first token took longer than a whole generation, the machine was disturbed and
            # the pair says nothing; if all did, whole generations are an upper bound.
            known = [whole - first for whole, first in pairs if whole > first]
            return known or [whole for whole, _ in pairs]

        def rates(amount: int, seconds: list[float]) -> Json:
            return spread([amount / each for each in seconds])

        tokens = settings.batch_size * settings.length
        return {
            "training_tokens_per_second": rates(tokens, seconds("training_step")),
            "generation_tokens_per_second": {
                str(n): rates(n * settings.new_tokens, after_first(n)) for n in (1, 8)
            },
            "first_token_seconds": {str(n): spread(seconds(f"first_token_{n}")) for n in (1, 8)},
            "compile_seconds": spread([visit["compile_seconds"] for visit in visits]),
            "peak_memory_bytes": min(run["peak_memory_bytes"] for run in runs),
        }

    def judge(self, rows: list[Json]) -> Json:
        """The ranks: a row whose difference to the row above is not significant shares its rank.
        Every row has its differences to all rows above it."""
        rows.sort(key=lambda row: row["bits_per_byte"]["mean"])
        scores = [_scores(row["runs"]) for row in rows]
        for place, (row, own) in enumerate(zip(rows, scores, strict=True)):
            differences = {
                rows[i]["system"]: interval(
                    own["nats"].shape,
                    lambda w, own=own, other=scores[i]: (
                        _metric(own, "bits_per_byte", w) - _metric(other, "bits_per_byte", w)
                    ),
                )
                for i in range(place)
            }
            above = differences[rows[place - 1]["system"]] if place else None
            shared = above is not None and above["low"] <= 0
            row["rank"] = rows[place - 1]["rank"] if shared else place + 1
            row |= {"differences": differences, "difference_from_above": above}
        add_scores(rows, self.score)
        # All systems of rank 1: the intervals do not tell which of them is best.
        first = ", ".join(row["system"] for row in rows if row["rank"] == 1)
        best = {"system": first, "value": rows[0]["bits_per_byte"]["mean"]}
        return {"bits per byte": best, **winners(rows, WINNERS)}

    def page(self, board: Json) -> Page:
        return make_page(board)


def _scores(runs: Sequence[Json]) -> _Scores:
    fields = ("nats", "top1", "top5", "tokens", "bytes")
    scores = {field: np.array([run["test"][field] for run in runs]) for field in fields}
    return {**scores, "bits": scores["nats"] / math.log(2)}


def _metric(scores: _Scores, name: str, weights: Weights) -> Float[np.ndarray, "_"]:
    """One of METRICS, with each of the weights."""
    above, below = (np.sum(weights * scores[field], axis=(1, 2)) for field in METRICS[name])
    return above / below
