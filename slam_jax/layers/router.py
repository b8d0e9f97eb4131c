"""The choice of experts for each token, and the losses that balance their loads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.linear import LECUN_NORMAL, Initializer, Linear
from slam_jax.layers.precision import upcast

_TINY = 1e-20  # as in DeepSeek's code


class Routing(NamedTuple):
    """experts: the k chosen experts of each token, best first. weights: factors of their outputs.
    probs: of all experts, for the losses. weights and probs are float32 or wider."""

    weights: Float[Array, "*B T k"]
    experts: Int[Array, "*B T k"]
    probs: Float[Array, "*B T E"]


class Router(nnx.Module):
    """A score of every expert, in float32 or wider, and the k experts with the best scores.

    Args:
      num_experts: E. num_experts_per_token: k.
      num_groups, top_groups: experts form groups of neighbours. A token chooses from the
        `top_groups` best groups (DeepSeek-V2, section 2.2.2). 1 group = no limit.
      renormalize: the k weights sum to 1. scale: factor of the weights; with a softmax only of
        those that are not renormalised.
      sigmoid: scores are sigmoids and not a softmax. Each expert has a bias, which counts for the
        choice and not for the weights; a group is as good as its two best experts together. Source:
        DeepSeek-AI 2024, "DeepSeek-V3" (arXiv 2412.19437), section 2.1.2.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = False,
        scale: float = 1.0,
        sigmoid: bool = False,
        kernel_init: Initializer = LECUN_NORMAL,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_experts_per_token = num_experts_per_token
        self.num_groups, self.top_groups = num_groups, top_groups
        self.renormalize, self.scale = renormalize, scale
        kw: Any = dict(kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)
        self.scores = Linear(embed_dim, num_experts, dtype=upcast(param_dtype), **kw)
        own = jnp.zeros((num_experts,), upcast(param_dtype))
        self.choice_bias = nnx.Param(own) if sigmoid else None

    def __call__(self, x: Float[Array, "*B T D"]) -> Routing:
        # By default accelerators multiply float32 with fewer bits, which decides near ties wrongly.
        with jax.default_matmul_precision("highest"):
            scores = self.scores(x)
        if self.choice_bias is not None:
            return self._by_sigmoids(jax.nn.sigmoid(scores), self.choice_bias[...])
        probs = jax.nn.softmax(scores, axis=-1)
        allowed = self._in_best_groups(probs, 1, 0.0)
        weights, experts = jax.lax.top_k(allowed, self.num_experts_per_token)
        if self.renormalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        else:
            weights = weights * self.scale
        return Routing(weights, experts, probs)

    def _by_sigmoids(self, scores: Float[Array, "*B T E"], bias: Float[Array, "E"]) -> Routing:
        # The bias follows the loads (section 2.1.2), not a gradient.
        bias = jax.lax.stop_gradient(bias).astype(scores.dtype)
        choice = jax.lax.stop_gradient(scores) + jax.lax.broadcast_to_rank(bias, scores.ndim)
        allowed = self._in_best_groups(
            choice, min(2, choice.shape[-1] // self.num_groups), -jnp.inf
        )
        _, experts = jax.lax.top_k(allowed, self.num_experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.renormalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + _TINY)
        probs = scores / scores.sum(axis=-1, keepdims=True)
        return Routing(weights * self.scale, experts, probs)

    def _in_best_groups(
        self, choice: Float[Array, "*B T E"], count: int, closed: float
    ) -> Float[Array, "*B T E"]:
        """`choice`, and `closed` for experts outside of the best groups, which are compared by the
        sum of their `count` best experts."""
        if self.top_groups == self.num_groups:
            return choice
        grouped = choice.reshape(*choice.shape[:-1], self.num_groups, -1)
        value = jax.lax.top_k(grouped, count)[0].sum(axis=-1)
        _, best = jax.lax.top_k(value, self.top_groups)
        open_ = jax.nn.one_hot(best, self.num_groups, dtype=bool).any(axis=-2)
        return jnp.where(open_[..., None], grouped, closed).reshape(choice.shape)


def load_balancing_loss(
    routings: Sequence[Routing], mask: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
    """E sum_e f_e P_e: f_e choices of expert e a token, P_e its mean probability, both over the
    real tokens of all layers at once. k where loads are even.

    Sources: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), section 2.2; pooled over
    layers as in the Mixtral and Jamba of transformers.
    """
    num_experts = routings[0].probs.shape[-1]
    chosen = sum(_mean(_chosen(r), mask, r.probs.ndim - 1) for r in routings) / len(routings)
    probs = sum(_mean(r.probs, mask, r.probs.ndim - 1) for r in routings) / len(routings)
    return num_experts * jnp.sum(chosen * probs)


def sequence_balance_loss(
    routing: Routing, mask: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
    """sum_e f_e P_e of each sequence, their mean; f_e = E / k times the choices of e a token.

    1 where loads are even. Source: DeepSeek-V2 (arXiv 2405.04434), equations 23 to 25, over
    each sequence by itself as in the released code (`seq_aux`).
    """
    return jnp.mean(jnp.sum(_fractions(routing, mask) * _mean(routing.probs, mask, 1), axis=-1))


def device_balance_loss(
    routing: Routing, num_devices: int, mask: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
    """The same over groups of experts that are placed on one device; equations 26 to 28."""
    groups = (*routing.probs.shape[:-2], num_devices, -1)
    fractions = _fractions(routing, mask).reshape(groups).mean(axis=-1)
    probs = _mean(routing.probs, mask, 1).reshape(groups).sum(axis=-1)
    return jnp.mean(jnp.sum(fractions * probs, axis=-1))


def communication_balance_loss(
    routing: Routing, num_devices: int, top_devices: int, mask: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
    """The same over the numbers of tokens sent to each device; equations 29 to 31.

    top_devices: M, the most devices a token is sent to.
    """
    groups = (*routing.probs.shape[:-1], num_devices, -1)
    sent = jnp.float32(_chosen(routing).reshape(groups).max(axis=-1) > 0)
    fractions = _mean(sent, mask, 1) * num_devices / top_devices
    groups = (*routing.probs.shape[:-2], num_devices, -1)
    probs = _mean(routing.probs, mask, 1).reshape(groups).sum(axis=-1)
    return jnp.mean(jnp.sum(fractions * probs, axis=-1))


def _chosen(routing: Routing) -> Float[Array, "*B T E"]:
    """1 for each expert that a token chose, else 0."""
    return jax.nn.one_hot(routing.experts, routing.probs.shape[-1]).sum(axis=-2)


def _fractions(routing: Routing, mask) -> Float[Array, "*B E"]:
    num_experts, k = routing.probs.shape[-1], routing.experts.shape[-1]
    return _mean(_chosen(routing), mask, 1) * num_experts / k


def _mean(x, mask, num_axes: int):
    """The mean over the real tokens of the `num_axes` axes before the last one."""
    axes = tuple(range(x.ndim - 1 - num_axes, x.ndim - 1))
    if mask is None:
        return jnp.mean(x, axis=axes)
    weight = mask[..., None].astype(x.dtype)
    return jnp.sum(x * weight, axis=axes) / jnp.maximum(jnp.sum(weight, axis=axes), 1)
