"""AdamW or Muon with warm-up and cosine, clipping, and decay where decay belongs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers, muon

from slam_jax.errors import require, require_count

OPTIMIZERS = ("adamw", "muon")
# Of Newton-Schulz, Jordan et al. 2024. A row an iteration, which makes a loop of them: the program
# is a third as long as with all iterations of all kernels written out.
_NEWTON_SCHULZ = 5 * ((3.4445, -4.7750, 2.0315),)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """name: "adamw", or "muon" for the kernels inside the network and Adam for the rest (`head`,
    embeddings, norms, biases); one learning rate serves both.
    learning_rate: the peak, reached after `warmup_steps` from 0, then a cosine to
    `final_fraction` of it at the last step. Steps that are skipped do not count.
    b1, b2: of Adam. momentum: of Muon. epsilon: of both. weight_decay: of the kernels; under Muon
    not of `head`.
    clip_norm: global gradient norm, None = no clipping.
    ema_decay: of the averaged parameters that evaluation then uses, None = no average.
    accumulate_steps: a batch is taken in that many parts, one after the other. The gradient is that
    of the whole but for the alignment loss, which sets the pairs of one part against each other and
    counts each part, as all of them do, by its answer tokens.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.01
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.95
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    accumulate_steps: int = 1

    def __post_init__(self):
        positive = "a number above 0"
        require(self.name in OPTIMIZERS, "optimizer.name", self.name, f"one of {OPTIMIZERS}")
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, positive)
        require_count("optimizer.warmup_steps", self.warmup_steps, least=0, most=2**31 - 1)
        require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, positive)
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        for field in ("final_fraction", "b1", "b2", "momentum", "ema_decay"):
            value = getattr(self, field)
            ok = (value is None and field == "ema_decay") or (value is not None and 0 <= value <= 1)
            require(ok, f"optimizer.{field}", value, "a number from 0 to 1")
        clip = self.clip_norm
        require(clip is None or clip > 0, "optimizer.clip_norm", clip, f"None or {positive}")
        require_count("optimizer.accumulate_steps", self.accumulate_steps)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: the kernels of linear maps and convolutions.

    Norm scales, biases, embeddings and learned queries are left alone.
    """

    def is_kernel(path, _) -> bool:
        return getattr(path[-1], "key", None) == "kernel"

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def muon_axes(params: Any) -> Any:
    """Which axes of each kernel are its inputs and which its outputs; None = left to Adam.

    The stacked kernels of processes and of experts are one matrix each. `head` writes logits and,
    like the embeddings, is no map inside the network.
    """

    def axes(path, x) -> MuonDimensionNumbers | None:
        names = [getattr(key, "key", None) for key in path]
        if names[-1] != "kernel" or names[0] == "head":
            return None
        first = 1 if {"stack", "experts"} & set(names) else 0
        is_convolution = x.ndim - first == 4
        # Heads to width (N, H, D) and convolutions take in all but the last axis; the other maps
        # take in the first: (D, F), (D, N, H).
        split = x.ndim - 1 if names[-2] == "out" or is_convolution else first + 1
        return MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, x.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Number of updates made before -> learning rate."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, num_steps - 1),
        num_steps,
        config.learning_rate * config.final_fraction,
    )


def updates_made(opt_state: optax.OptState) -> Int[Array, ""] | None:
    """How many updates an optimizer has made, which is what its schedule goes by; None where it
    does not count them."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return counts[0][1] if counts else None  # each of its parts counts, and all alike


def only_reached(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, but an array whose gradient is all 0 stands still.

    A batch without an image has no say on the image stream. Without this its momentum would, and
    Muon, which gives every update the same size, would go on in the direction of the last image at
    full length.
    """

    def update(updates, state, params=None):
        moves, state = optimizer.update(updates, state, params)
        reached = jax.tree.map(
            lambda g, move: jnp.where(jnp.any(g != 0), move, 0.0), updates, moves
        )
        return reached, state

    return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` steps.

    Sources: Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024, "Muon", with the update size that
    lets it share AdamW's learning rate: Liu et al. 2025, "Muon is Scalable for LLM Training",
    section 2.2.
    """
    schedule = make_schedule(config, num_steps)
    if config.name == "muon":
        optimizer = muon(
            schedule,
            _NEWTON_SCHULZ,
            beta=config.momentum,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=0.2,
        )
    else:
        optimizer = optax.adamw(
            schedule,
            config.b1,
            config.b2,
            config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return only_reached(optimizer)
