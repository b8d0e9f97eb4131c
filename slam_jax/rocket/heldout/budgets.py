"""Sizes at which systems may be compared: as much of what counts for each of them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from slam_jax.errors import ConfigError, require_count
from slam_jax.language_models import make_config, measure
from slam_jax.language_models.flops import training_flops

BUDGETS = ("parameters", "flops")
TOLERANCE = 0.02

# In all systems of the preset `seed` a head is so wide; it stays so, and widths are multiples.
_HEAD_DIM = 32
_MLPS = ("mlp_dim", "expert_dim")
_HALVED = ("slam_v6",)  # one of its blocks has half of the MLP
_RANKS = ("q_lora_rank", "kv_lora_rank")
_LEAST, _MOST = 0.25, 4.0  # times the proportion of an MLP in `seed`


class Budget(NamedTuple):
    """What every system may spend.

    of: "parameters", those that a token meets but for tables and head; or "flops", training
    floating-point operations a token, head and all. amount: how many.
    """

    of: str
    amount: float

    def spent(self, config: Any, length: int) -> float:
        """What a configuration takes of it, in rows of so many tokens."""
        if self.of == "flops":
            return training_flops(config, length) / length
        size = measure(config)
        return float(size.active - size.embedding)


def fit(name: str, budget: Budget, length: int, vocab_size: int) -> Any:
    """The system at the width at which it meets the budget, in the proportions of `seed`.

    Depth, head width and numbers of experts are those of `seed`; model width, heads and ranks go
    with the width; and the MLPs fill up what is missing. Of all widths the one is taken whose MLPs
    come nearest to their proportion in `seed`.

    Raises ConfigError where no width comes within 2% of it.
    """
    require_count("length", length)
    best, best_distance = None, math.inf
    # Even numbers: one of the systems has attention with half of its heads.
    for num_heads in range(2, 129, 2):
        if budget.spent(_at(name, num_heads, _LEAST, vocab_size), length) > budget.amount:
            break
        config = _fill(lambda scale, n=num_heads: _at(name, n, scale, vocab_size), budget, length)
        if config is None:
            continue
        distance = abs(math.log(config.mlp_dim / config.embed_dim / _proportion(name)))
        if distance < best_distance:
            best, best_distance = config, distance
    if best is None:
        raise ConfigError(
            f"budget is {budget.amount:g} {budget.of}; {name} comes within {TOLERANCE:.0%} of it "
            "at no width; give more"
        )
    return best


def _proportion(name: str) -> float:
    seed = make_config(name, "seed")
    return seed.mlp_dim / seed.embed_dim


def _at(name: str, num_heads: int, scale: float, vocab_size: int) -> Any:
    """`seed` at another width, its MLPs that much wider still."""
    seed = make_config(name, "seed")
    width = num_heads / seed.num_heads
    changes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "embed_dim": num_heads * _HEAD_DIM,
        "num_heads": num_heads,
    }
    for field in (*_MLPS, *_RANKS, "num_kv_heads"):
        value = getattr(seed, field, None)
        if value is None:
            continue
        if field in _MLPS:
            step = 2 if name in _HALVED else 1
            changes[field] = max(1, round(value * width * scale / step)) * step
        else:
            changes[field] = max(1, round(value * width))
        if field == "num_kv_heads":
            changes[field] = math.gcd(changes[field], num_heads)
    return make_config(name, "seed", **changes)


def _fill(make: Callable[[float], Any], budget: Budget, length: int) -> Any:
    """The configuration that meets the budget, or None. What it takes grows evenly with the
    MLPs."""
    low, high = (budget.spent(make(scale), length) for scale in (_LEAST, 1.0))
    scale = _LEAST + (1 - _LEAST) * (budget.amount - low) / (high - low)
    if scale > _MOST:
        return None
    config = make(scale)
    return config if abs(budget.spent(config, length) / budget.amount - 1) <= TOLERANCE else None
