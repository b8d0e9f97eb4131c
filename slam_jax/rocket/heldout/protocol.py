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

from slam_jax.errors import InputError
from slam_jax.language_models.flops import training_flops
from slam_jax.rocket.heldout.corpus import load_corpus, make_corpus, save_corpus
from slam_jax.rocket.heldout.measure import time_system, train
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.machine import spread
from slam_jax.rocket.metrics import Metric, Part, Ratio, add_scores, interval, winners
from slam_jax.rocket.sweep import TunedComparison
from slam_jax.rocket.systems import sizes
from slam_jax.rocket.tasks import Json, Results, Task

BITS = Metric("bits_per_byte.mean", least=True)
TRAINING = Metric("training_tokens_per_second.median")
GENERATION = Metric("generation_tokens_per_second.8.median")
MEMORY = Metric("peak_memory_bytes", least=True, scale=2**-30)
WINNERS = {
    "top-1": Metric("top1.mean"),
    "training, tokens/s": TRAINING,
    "generation, tokens/s": GENERATION,
    "first token, ms": Metric("first_token_seconds.1.median", least=True, scale=1e3),
    "peak memory, GiB": MEMORY,
    "cache, bytes a token": Metric("cache_bytes_per_token", least=True),
}
# Ranks are by bits per byte alone, because speed and memory depend on the machine.
SCORE = {
    "quality": Part("70 x the lowest held-out bits per byte / its own", 70, BITS),
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


class Heldout(TunedComparison):
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
        self._sizes = {name: self._size(name) for name in models}

    def _size(self, name: str) -> Json:
        """Parameters, operations, cache and widths of a system at the budget."""
        settings, fields = self.options, ("embed_dim", "num_heads", "mlp_dim", "expert_dim")
        config = settings.config_of(name, self.data["vocab_size"])
        return {
            **sizes(config),
            "training_flops_per_token": training_flops(config, settings.length) / settings.length,
            "widths": {field: getattr(config, field) for field in fields if hasattr(config, field)},
        }

    def tasks(self, results: Results) -> list[Task]:
        settings, corpus = self.options, {"corpus": str(self._folder)}
        trial = {**corpus, "num_tokens": settings.sweep_tokens, "test": False}
        whole = {**corpus, "num_tokens": settings.num_tokens, "test": True}
        share = settings.sweep_tokens / settings.num_tokens
        return [
            *self.trials(results, train, share, trial),
            *self.tuned(results, train, whole),
            *self.visits(time_system, 0.1, arguments=corpus),
        ]

    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        runs = [{"seed": seed, **done[f"seed {seed}"]} for seed in self.options.seeds]
        figures = _figures(runs)
        for metric, figure in figures.items():
            for run, value in zip(runs, figure.of_seeds(), strict=True):
                run[metric] = value
        return {
            **self._sizes[name],
            **self.tuning(done),
            **self._speed(done),
            # The smallest: that of a process which found its functions compiled.
            "peak_memory_bytes": min(run["peak_memory_bytes"] for run in runs),
            "runs": runs,
            "stability": float(np.mean([run["stability"] for run in runs])),
            **{metric: interval(figure) for metric, figure in figures.items()},
        }

    def _speed(self, done: Mapping[str, Json]) -> Json:
        """Times and rates of all visits."""
        settings, visits = self.options, self.timings(done)

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
        }

    def judge(self, rows: list[Json]) -> Json:
        """The ranks: a row whose difference to the row above is not significant shares its rank.
        Every row has its differences to all rows above it."""
        rows.sort(key=BITS.of)
        bits = {row["system"]: _figures(row["runs"])["bits_per_byte"] for row in rows}
        for place, row in enumerate(rows):
            names = [other["system"] for other in rows[:place]]
            differences = {name: interval(bits[row["system"]], bits[name]) for name in names}
            above = differences[names[-1]] if place else None
            shared = above is not None and above["low"] <= 0
            row["rank"] = rows[place - 1]["rank"] if shared else place + 1
            row |= {"differences": differences, "difference_from_above": above}
        add_scores(rows, self.score)
        # All systems of rank 1: the intervals do not tell which of them is best.
        first = ", ".join(row["system"] for row in rows if row["rank"] == 1)
        return {
            "bits per byte": {"system": first, "value": BITS.best(rows)},
            **winners(rows, WINNERS),
        }


def _figures(runs: Sequence[Json]) -> dict[str, Ratio]:
    """Each of METRICS, over seeds and test documents."""
    fields = ("nats", "top1", "top5", "tokens", "bytes")
    sums = {field: np.array([run["test"][field] for run in runs], float) for field in fields}
    sums["bits"] = sums["nats"] / math.log(2)
    return {name: Ratio(sums[above], sums[below]) for name, (above, below) in METRICS.items()}
