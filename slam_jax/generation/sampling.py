"""Which token comes next: the rules, and the choice by them."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from slam_jax.data.tokenizer import check_text
from slam_jax.errors import InputError

_MOST_SAMPLES, _MOST_NEW_TOKENS = 1024, 1 << 16
_EVERYTHING = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer is chosen; by default the most probable token, each time.

    max_new_tokens: longest answer, its <eos> included.
    temperature: divides the logits; 0 = the most probable token, whatever the filters say.
    top_k: only the k most probable tokens. top_p: only the most probable ones that together have
      at least this probability. min_p: only those at least this fraction as probable as the most
      probable one. None = no such filter; they apply in this order, each to what the others left.
    repetition_penalty: logits of tokens that the prompt or the answer has already are divided by it
      where positive and multiplied where negative; 1 = none.
    num_samples: answers a request, each with randomness of its own, all from one encode.
    stop: an answer ends where one of these texts begins, and is given without it.

    Sources: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p),
    Keskar et al. 2019, section 4.1 (repetition penalty).

    Raises:
      InputError: naming the field, if a value cannot be used.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_samples: int = 1
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        _check("max_new_tokens", self.max_new_tokens, 1, _MOST_NEW_TOKENS, Integral)
        _check("num_samples", self.num_samples, 1, _MOST_SAMPLES, Integral)
        for field in ("max_new_tokens", "num_samples"):  # NumPy's as Python's
            object.__setattr__(self, field, int(getattr(self, field)))
        # Below the least, differences of logits would no longer be finite numbers.
        if self.temperature != 0:
            _check("temperature", self.temperature, 1e-3, 1e3, Real, "0 (greedy) or ")
        if self.top_k is not None:
            _check("top_k", self.top_k, 1, _EVERYTHING, Integral, "None or ")
        for field in ("top_p", "min_p"):
            if getattr(self, field) is not None:
                _check(field, getattr(self, field), 0, 1, Real, "None or ")
        _check("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, Real)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop is {list(self.stop)!r}; expected texts that are not empty")
        for text in self.stop:
            check_text(text, "stop")

    @property
    def rules(self) -> "Rules":
        return Rules(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(_EVERYTHING if self.top_k is None else self.top_k),
            top_p=jnp.float32(1.0 if self.top_p is None else self.top_p),
            min_p=jnp.float32(0.0 if self.min_p is None else self.min_p),
            repetition_penalty=jnp.float32(self.repetition_penalty),
        )


@struct.dataclass
class Rules:
    """The numbers of a `Sampling` as arrays, so that others of them need no other program."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def greedy() -> Rules:
    """The rules of taking the most probable token."""
    return Sampling().rules


def choose(
    logits: Float[Array, "*R V"], seen: Bool[Array, "*R V"], keys: Key[Array, "*R"], rules: Rules
) -> Int[Array, "*R"]:
    """The next token of every row.

    seen: tokens that the row has already. keys: [*R], one a row, so that a row's choice is the same
    whoever is beside it.
    """
    penalty = rules.repetition_penalty
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)

    def most_probable() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled() -> jax.Array:
        best_first = jnp.argsort(logits, axis=-1, descending=True)
        ranked = jnp.take_along_axis(logits, best_first, axis=-1)
        ranked = keep_allowed((ranked - ranked[..., :1]) / rules.temperature, rules)
        draw = jax.random.categorical
        for _ in range(keys.ndim):
            draw = jax.vmap(draw)
        rank = draw(keys, ranked)
        return jnp.take_along_axis(best_first, rank[..., None], axis=-1)[..., 0].astype(jnp.int32)

    return jax.lax.cond(rules.temperature > 0, sampled, most_probable)


def keep_allowed(ranked: Float[Array, "*R V"], rules: Rules) -> Float[Array, "*R V"]:
    """Logits in descending order, -inf where a filter leaves the token out; the first one stays."""
    rank = jnp.arange(ranked.shape[-1])
    ranked = jnp.where(rank < rules.top_k, ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Rounded sums must not cut the tail off where nothing is to be cut.
    inside = (before < rules.top_p) | (rules.top_p >= 1)
    kept = inside & (probs >= rules.min_p * probs[..., :1])
    return jnp.where(kept | (rank == 0), ranked, -jnp.inf)


def _check(
    field: str, value: Any, least: int | float, most: int | float, kind: type, before: str = ""
) -> None:
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not (number and least <= value <= most):
        raise InputError(f"{field} is {value!r}; expected {before}{least:g} to {most:g}")
