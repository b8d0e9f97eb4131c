"""AdamW with warm-up and cosine, clipping, and decay where decay belongs."""

import dataclasses
from typing import Any

import jax
import optax

from slam_jax.errors import require


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """learning_rate: the peak, reached after `warmup_steps` from 0, then a cosine to
    `final_fraction` of it at the last step.
    b1, b2, epsilon, weight_decay: of AdamW. clip_norm: global gradient norm, None = no clipping.
    ema_decay: of the averaged parameters that evaluation then uses, None = no average.
    accumulate_steps: a batch is taken in that many parts, one after the other.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.01
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    accumulate_steps: int = 1

    def __post_init__(self):
        positive = "a number above 0"
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, positive)
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, positive)
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        for field in ("final_fraction", "b1", "b2", "ema_decay"):
            value = getattr(self, field)
            ok = (value is None and field == "ema_decay") or (value is not None and 0 <= value <= 1)
            require(ok, f"optimizer.{field}", value, "a number from 0 to 1")
        clip = self.clip_norm
        require(clip is None or clip > 0, "optimizer.clip_norm", clip, f"None or {positive}")
        steps = self.accumulate_steps
        require(steps >= 1, "optimizer.accumulate_steps", steps, "at least 1")


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: the kernels of linear maps and convolutions.

    Norm scales, biases, embeddings and learned queries are left alone.
    """

    def is_kernel(path, _) -> bool:
        return getattr(path[-1], "key", None) == "kernel"

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step -> learning rate."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, num_steps - 1),
        num_steps,
        config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` steps."""
    adamw = optax.adamw(
        make_schedule(config, num_steps),
        config.b1,
        config.b2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
