"""The settings of the protocol `heldout`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from slam_jax.errors import require, require_count
from slam_jax.rocket.heldout.budgets import BUDGETS, fit
from slam_jax.rocket.heldout.corpus import STDLIB
from slam_jax.rocket.tasks import check_settings


@dataclasses.dataclass(frozen=True)
class HeldoutSettings:
    """What is compared, on which text, and for how long.

    text: "stdlib", the source text of the interpreter's standard library; "tfds:NAME"; or a folder
      of text files. vocab_size: of the tokenizer, learned from its training documents.
    budget: a number of "parameters" (active, without embeddings and head) or of training "flops"
      per token.
    length, batch_size: of a batch, in tokens and rows. num_tokens: that a run reads.
    learning_rates: each is tried with the first of `seeds` in a run of `sweep_tokens`; the one with
      the lowest validation loss is used. While the best is the lowest or the highest tried, the
      next one beyond is tried too, at most `more_learning_rates` times.
    seeds: one run each, with its own parameters, order of rows and dropout.
    weight_decay, warmup: of AdamW with a cosine schedule; warmup is a share of the run.
    document_tokens: the first so many tokens of each held-out document are predicted.
    curve_points: evaluations on the validation documents along a run.
    prompt_length, new_tokens: of the timed generation. rounds, repeats: everything is timed in
      `rounds` processes, `repeats` times in each.
    """

    text: str = STDLIB
    vocab_size: int = 2_048
    budget_of: str = "parameters"
    budget: float = 4e6
    length: int = 128
    batch_size: int = 16
    num_tokens: int = 1 << 20
    learning_rates: Sequence[float] = (7e-4, 2e-3, 6e-3)
    more_learning_rates: int = 2
    sweep_tokens: int = 1 << 18
    seeds: Sequence[int] = (0, 1, 2)
    weight_decay: float = 0.1
    warmup: float = 0.1
    document_tokens: int = 2_048
    curve_points: int = 8
    prompt_length: int = 64
    new_tokens: int = 64
    rounds: int = 3
    repeats: int = 3

    def __post_init__(self):
        zero = ("more_learning_rates", "weight_decay", "warmup", "seeds")
        check_settings(self, zero, large=("num_tokens", "sweep_tokens", "seeds"))
        require_count("more_learning_rates", self.more_learning_rates, least=0, most=16)
        for field in ("num_tokens", "sweep_tokens"):
            value, least = getattr(self, field), self.curve_points * self.batch_size * self.length
            expected = f"at least {least:,}, a batch for each of the curve_points"
            require(value >= least, field, value, expected)
        require(self.budget_of in BUDGETS, "budget_of", self.budget_of, f"one of {BUDGETS}")
        require(self.warmup < 1, "warmup", self.warmup, "a share in [0, 1)")

    def config_of(self, name: str, vocab_size: int) -> Any:
        """The configuration of a system that meets the budget."""
        return fit(name, self.budget_of, self.budget, self.length, vocab_size)
