"""Sizes at which systems are compared: all have as many parameters or operations."""

import math
from typing import Any

from slam_jax.errors import ConfigError
from slam_jax.language_models import make_config, measure
from slam_jax.language_models.flops import training_flops

BUDGETS = ("parameters", "flops")
TOLERANCE = 0.02

_HEAD_DIM = 32  # of all systems in the preset `seed`, at every width
_HALVED = ("slam_v6",)  # one of its blocks has half of the MLP, whose width must be even
# The width of an MLP relative to that of the model, as a multiple of the ratio in `seed`.
_LEAST, _MOST = 0.25, 4.0


def cost(config: Any, budget_of: str, length: int) -> float:
    """Active parameters without embeddings and head; or, for a budget of "flops", training
    operations per token of a row of `length` tokens, including the head."""
    if budget_of == "flops":
        return training_flops(config, length) / length
    size = measure(config)
    return float(size.active - size.embedding)


def fit(name: str, budget_of: str, amount: float, length: int, vocab_size: int) -> Any:
    """The configuration of a system that costs `amount`, with the proportions of `seed`.

    Depth, head width and number of experts are those of `seed`. Model width, heads and ranks are
    scaled together, and MLPs fill up the rest. Of all widths that meet the budget, the one is used
    whose MLPs are nearest to their proportion in `seed`.

    Raises ConfigError if no width comes within 2% of the budget.
    """
    seed, found = make_config(name, "seed"), []
    # Even numbers, because one of the systems has attention with half of its heads.
    for num_heads in range(2, 129, 2):
        least = cost(_scaled(name, num_heads, _LEAST, vocab_size), budget_of, length)
        if least > amount:
            break
        normal = cost(_scaled(name, num_heads, 1.0, vocab_size), budget_of, length)
        # The cost is linear in the width of the MLPs.
        mlp = _LEAST + (1 - _LEAST) * (amount - least) / (normal - least)
        if mlp <= _MOST:
            config = _scaled(name, num_heads, mlp, vocab_size)
            if abs(cost(config, budget_of, length) / amount - 1) <= TOLERANCE:
                found.append(config)
    if not found:
        raise ConfigError(
            f"budget is {amount:g} {budget_of}; {name} comes within {TOLERANCE:.0%} of it "
            "at no width; give more"
        )
    usual = seed.mlp_dim / seed.embed_dim
    return min(found, key=lambda config: abs(math.log(config.mlp_dim / config.embed_dim / usual)))


def _scaled(name: str, num_heads: int, mlp: float, vocab_size: int) -> Any:
    """The preset `seed` with another number of heads, and all widths in proportion. MLPs are scaled
    by `mlp`, too."""
    seed = make_config(name, "seed")
    width, step = num_heads / seed.num_heads, 2 if name in _HALVED else 1
    changes = {"embed_dim": num_heads * _HEAD_DIM, "num_heads": num_heads}
    scales = {"mlp_dim": (width * mlp, step), "expert_dim": (width * mlp, step)}
    scales |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "num_kv_heads"), (width, 1))
    for field, (scale, step) in scales.items():
        value = getattr(seed, field, None)
        if value is not None:
            changes[field] = max(1, round(value * scale / step)) * step
    if "num_kv_heads" in changes:
        changes["num_kv_heads"] = math.gcd(changes["num_kv_heads"], num_heads)
    return make_config(name, "seed", vocab_size=vocab_size, **changes)
