"""Sampling rules, and the choice of the next token by them."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral, Real

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from slam_jax.data.tokenizer import check_unicode
from slam_jax.errors import InputError

_NO_TOP_K = 2**31 - 1
# Kind of number, smallest and largest value; fields whose default is None may be None too.
_RANGES = {
    "max_new_tokens": (Integral, 1, 1 << 16),
    "num_samples": (Integral, 1, 1024),
    "temperature": (Real, 0, 1e3),
    "top_k": (Integral, -1, _NO_TOP_K),
    "top_p": (Real, 0, 1),
    "min_p": (Real, 0, 1),
    "repetition_penalty": (Real, 1e-3, 1e3),
}
# Below it, differences of logits would no longer be finite; the result would be greedy anyway.
_LEAST_TEMPERATURE = 1e-3


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer is chosen; by default greedily.

    max_new_tokens: longest answer, its <eos> included. None = the model's own default, which the
      longest answer of its training data fits into; less where the context ends before.
    temperature: divides the logits. 0 (or below 0.001) = greedy: always the most probable token,
      whatever the filters say.
    top_k: only the k most probable tokens; None, 0 or -1 = no such filter.
    top_p: only the most probable tokens that together have at least this probability.
    min_p: only tokens at least this fraction as probable as the most probable one.
      None = no such filter. The three filters apply in this order, each to the tokens that the
      previous ones kept. Tokens exactly as probable as the last one kept are kept too.
    repetition_penalty: divides positive logits, and multiplies negative logits, of tokens that the
      prompt or the answer already has; 1 = none.
    num_samples: answers per request, each with its own randomness, all from one encode.
    stop: texts that end an answer where they begin; the answer is returned without them.

    Sources: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p),
    Keskar et al. 2019, section 4.1 (repetition penalty).

    Raises:
      InputError: naming the field, if a value cannot be used.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_samples: int = 1
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for field, (kind, least, most) in _RANGES.items():
            value, optional = getattr(self, field), getattr(type(self), field) is None
            if optional and value is None:
                continue
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not (number and least <= value <= most):
                expected = f"{least:g} to {most:g}" + ", or None" * optional
                raise InputError(f"{field} is {value!r}; expected {expected}")
            # NumPy's numbers become Python's.
            object.__setattr__(self, field, int(value) if kind is Integral else float(value))
        if not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {list(stop)!r}; expected texts that are not empty")
        for text in stop:
            check_unicode(text, "stop")

    @property
    def rules(self) -> "Rules":
        greedy = self.temperature < _LEAST_TEMPERATURE
        return Rules(
            temperature=jnp.float32(0 if greedy else self.temperature),
            top_k=jnp.int32(_NO_TOP_K if self.top_k in (None, 0, -1) else self.top_k),
            top_p=jnp.float32(1.0 if self.top_p is None else self.top_p),
            min_p=jnp.float32(0.0 if self.min_p is None else self.min_p),
            repetition_penalty=jnp.float32(self.repetition_penalty),
        )


@struct.dataclass
class Rules:
    """The numbers of a `Sampling` as arrays: other numbers need no new compilation.

    Each is one number for all rows, or one a row.
    """

    temperature: Float[Array, "*#B"]
    top_k: Int[Array, "*#B"]
    top_p: Float[Array, "*#B"]
    min_p: Float[Array, "*#B"]
    repetition_penalty: Float[Array, "*#B"]

    def over_tokens(self) -> "Rules":
        """The same with an axis for the tokens, where there is one for the rows."""
        return jax.tree.map(lambda x: x[..., None] if jnp.ndim(x) else x, self)


def choose(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], keys: Key[Array, "*B"], rules: Rules
) -> Int[Array, "*B"]:
    """The next token of every row.

    seen: tokens that the row already has. keys: one per row, so that no row depends on another.

    The noise of a token depends on its id and not on its rank. So the choice stays the same when
    two nearly equal logits change places, as in bfloat16 between batch sizes. Noise, and the
    sorting for the filters, are computed only where a row needs them.
    """
    each = rules.over_tokens()
    penalised = jnp.where(
        logits > 0, logits / each.repetition_penalty, logits * each.repetition_penalty
    )
    logits = jnp.where(seen, penalised, logits)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = rules.temperature > 0
    filters = (rules.top_k < logits.shape[-1]) | (rules.top_p < 1) | (rules.min_p > 0)

    def sampled() -> jax.Array:
        draw = jax.random.categorical
        for _ in range(keys.ndim):
            draw = jax.vmap(draw)
        # A row that is greedy has any finite scale.
        scale = jnp.where(each.temperature > 0, each.temperature, 1)
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / scale
        kept = jax.lax.cond(
            jnp.any(filters & draws), lambda: keep_allowed(scaled, rules), lambda: scaled
        )
        return jnp.where(draws, draw(keys, kept).astype(jnp.int32), best)

    return jax.lax.cond(jnp.any(draws), sampled, lambda: best)


def keep_allowed(logits: Float[Array, "*B V"], rules: Rules) -> Float[Array, "*B V"]:
    """The logits, with -inf where a filter removes the token; it never removes the best one."""
    rules = rules.over_tokens()
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jax.lax.broadcast_to_rank(jnp.arange(logits.shape[-1]), logits.ndim)
    probs = jax.nn.softmax(jnp.where(rank < rules.top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Without top-p a rounded sum above 1 must not cut off the tail.
    inside = (before < rules.top_p) | (rules.top_p >= 1)
    kept = inside & (rank < rules.top_k) & (probs >= rules.min_p * probs[..., :1])
    least = jnp.where(kept | (rank == 0), ranked, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
