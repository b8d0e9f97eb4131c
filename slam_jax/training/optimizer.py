"""AdamW or Muon with a warm-up and cosine schedule, clipping, and weight decay of kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from slam_jax.errors import require, require_count
from slam_jax.layers.precision import upcast
from slam_jax.layers.stacked import names_of

OPTIMIZERS = ("adamw", "muon")
# Coefficients of the Newton-Schulz iteration (Jordan et al. 2024). One row per iteration makes
# optax use a loop, which compiles faster than unrolled iterations.
_NEWTON_SCHULZ = 5 * ((3.4445, -4.7750, 2.0315),)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of a run.

    name: "adamw"; or "muon", which uses Muon for the kernels inside the network and Adam for the
    rest (`head`, embeddings, norms, biases), with the same learning rate.
    learning_rate: the peak. It is reached from 0 after `warmup_steps`, stays for a share
    `constant_fraction` of the run, then follows a cosine that reaches `final_fraction` of it after
    the last step. Skipped steps do not count.
    b1, b2: of Adam. momentum: of Muon. epsilon: of both. weight_decay: of kernels; with Muon not of
    `head`. clip_norm: largest global gradient norm, None = no clipping. ema_decay: of the moving
    average of parameters, which evaluations then use; None = no average.
    accumulate_steps: a batch is split into this many parts, one after the other, and their
    gradients are averaged by answer tokens. The result is the gradient of the whole batch, except
    for what compares the examples of a batch, which then compares those of a part: the alignment
    loss, and the load-balancing loss and the capacity of experts.
    train, freeze: patterns of parameter paths, such as "decoder/layers/0/*" or "*/bias". `*` is
    any text, with slashes; a pattern also matches everything below the path it names. Those that
    `train` matches train, without those that `freeze` matches. train=() = all but those that are
    loaded as base weights. The others have neither gradient, moments, average nor weight decay.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    constant_fraction: float = 0.0
    final_fraction: float = 0.01
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.95
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    accumulate_steps: int = 1
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("train", "freeze"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        positive, clip = "a number above 0", self.clip_norm
        require(self.name in OPTIMIZERS, "optimizer.name", self.name, f"one of {OPTIMIZERS}")
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, positive)
        require_count("optimizer.warmup_steps", self.warmup_steps, least=0, most=2**31 - 1)
        require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, positive)
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        for field in ("final_fraction", "constant_fraction", "b1", "b2", "momentum", "ema_decay"):
            value = getattr(self, field)
            ok = field == "ema_decay" if value is None else 0 <= value <= 1
            require(ok, f"optimizer.{field}", value, "a number from 0 to 1")
        require(clip is None or clip > 0, "optimizer.clip_norm", clip, f"None or {positive}")
        require_count("optimizer.accumulate_steps", self.accumulate_steps)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: for the kernels of linear maps and convolutions.

    Norm scales, biases, embeddings, learned queries and adapters do not decay.
    """

    return jax.tree.map_with_path(lambda path, _: _names(path)[-1] == "kernel", params)


def muon_axes(params: Any) -> Any:
    """The input and output axes of each kernel for Muon; None = Adam updates it, such as `head`.

    Each process, layer and expert of a stacked kernel is a matrix of its own.
    """

    def axes(path, x) -> MuonDimensionNumbers | None:
        names = _names(path)
        if names[-1] != "kernel" or "head" in names:
            return None
        first = 1 if {"stack", "experts"} & set(names) else 0
        first += _layer_axis(path) is not None
        is_convolution = x.ndim - first == 4
        # The inputs of (N, H, D) and of convolutions are all axes but the last; those of other
        # kernels, (D, F) and (D, N, H), are the first axis.
        split = x.ndim - 1 if names[-2] == "out" or is_convolution else first + 1
        return MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, x.ndim)))

    return jax.tree.map_with_path(axes, params)


def _layer_axis(path: Any) -> int | None:
    """The axis of stacked layers."""
    return names_of(jax.tree_util.keystr(path, simple=True, separator="/"))[1]


def _names(path: Any) -> list[Any]:
    return [getattr(key, "key", None) for key in path]


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of earlier updates."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, num_steps - 1)
    constant = min(round(config.constant_fraction * num_steps), num_steps - 1 - warmup)
    cosine = optax.cosine_decay_schedule(peak, num_steps - warmup - constant, config.final_fraction)
    parts = (optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak), cosine)
    return optax.join_schedules(parts, (warmup, warmup + constant))


def updates_made(opt_state: optax.OptState) -> Int[Array, ""] | None:
    """The number of updates made, as counted for the schedule; None where nothing counts them."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return counts[0][1] if counts else None  # all parts have the same count


def skip_zero_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, but an array whose gradient is 0 everywhere is not updated.

    Each of stacked layers has its own part of an array, which counts as an array. Otherwise
    momentum would change the image stream after a batch without images.
    """

    def skipped(path, gradient, update):
        layers = _layer_axis(path)
        if layers is None:
            return jnp.where(jnp.any(gradient != 0), update, 0.0)
        others = tuple(axis for axis in range(gradient.ndim) if axis != layers)
        return jnp.where(jnp.any(gradient != 0, axis=others, keepdims=True), update, 0.0)

    def update(updates, state, params=None):
        new, state = optimizer.update(updates, state, params)
        return jax.tree.map_with_path(skipped, updates, new), state

    return optax.GradientTransformation(optimizer.init, update)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm of all arrays together, in float32 or wider."""
    arrays = [x.astype(upcast(x.dtype)) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in arrays))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As that of optax, with the same state. That one compiles to more than twice the operations,
    since it allows for complex numbers and scales each array twice."""

    def update(updates, state, params=None):
        scale = max_norm / jnp.maximum(global_norm(updates), max_norm)
        return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `num_steps` steps.

    Sources: Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024 (Muon); Liu et al. 2025, "Muon is
    Scalable for LLM Training", section 2.2 (the update size that lets Muon share the learning rate
    of AdamW).
    """
    schedule = make_schedule(config, num_steps)
    b1, b2, epsilon, decay = config.b1, config.b2, config.epsilon, config.weight_decay
    if config.name == "muon":
        optimizer = muon(
            schedule,
            _NEWTON_SCHULZ,
            beta=config.momentum,
            eps=epsilon,
            weight_decay=decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=0.2,
        )
    else:
        optimizer = optax.adamw(schedule, b1, b2, epsilon, weight_decay=decay, mask=decay_mask)
    if config.clip_norm is not None:
        optimizer = optax.chain(clip_by_global_norm(config.clip_norm), optimizer)
    return skip_zero_gradients(optimizer)
