"""Mixture of experts: many gated MLPs, of which each token uses a few."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from slam_jax.kernels.grouped_matmul import grouped_matmul
from slam_jax.layers.constrain import sum_over
from slam_jax.layers.linear import LECUN_NORMAL, Initializer
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.precision import upcast
from slam_jax.layers.quantized_array import is_quantized
from slam_jax.layers.router import Router, Routing

Scaled = tuple[Shaped[Array, "E _ _"], Float[Array, "E _"] | None]
"""Kernels and their scales, which only quantised ones have."""


class ExpertLinear(nnx.Module):
    """The kernels [E, I, O] of E linear maps, each initialised like a `Linear`.

    `slam_jax.quantize` makes them int8 with a `scale` [E, O], or uint16; see `Linear`.
    """

    scale: nnx.Param | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer = LECUN_NORMAL,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        keys = jax.random.split(rngs.params(), num_experts)
        shape = (in_features, out_features)
        self.kernel = nnx.Param(jax.vmap(lambda key: kernel_init(key, shape, param_dtype))(keys))

    def scaled(self, dtype) -> Scaled:
        """The kernels, of `dtype` unless they are quantised."""
        kernel, scale = self.kernel[...], None if self.scale is None else self.scale[...]
        return (kernel if is_quantized(kernel) else kernel.astype(dtype)), scale


class Experts(nnx.Module):
    """E SwiGLU MLPs; a token's output is the weighted sum of the outputs of its chosen ones.

    Exact whatever the loads ("dropless"), unless a capacity is given. On several devices each runs
    its own experts on the tokens that chose them, and the outputs are summed: kernels never move.
    """

    def __init__(
        self,
        num_experts: int,
        embed_dim: int,
        mlp_dim: int,
        *,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)
        self.num_experts, self.dtype = num_experts, dtype
        self.gate = ExpertLinear(num_experts, embed_dim, mlp_dim, **kw)
        self.up = ExpertLinear(num_experts, embed_dim, mlp_dim, **kw)
        self.down = ExpertLinear(num_experts, mlp_dim, embed_dim, **kw)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        routing: Routing,
        *,
        mask: Bool[Array, "*B T"] | None = None,
        capacity: int | None = None,
    ) -> Float[Array, "*B T D"]:
        """mask: False for tokens that no expert takes; their output is 0.

        capacity: the most tokens an expert takes. Beyond it the tokens with the least weight are
        dropped (DeepSeek-V2, section 2.2.4). None = no limit.
        """
        k = routing.experts.shape[-1]
        rows, experts = x.reshape(-1, x.shape[-1]), routing.experts.reshape(-1, k)
        weights = routing.weights.reshape(-1, k)
        # An expert number beyond the last means that the choice is dropped.
        if mask is not None:
            experts = jnp.where(mask.reshape(-1, 1), experts, self.num_experts)
        if capacity is not None:
            experts = self._within_capacity(capacity, experts, weights)
        layers = (self.gate, self.up, self.down)
        kernels = tuple(layer.scaled(self.dtype) for layer in layers)
        y = sum_over("expert", self._run, kernels, (rows, experts, weights))
        return y.reshape(x.shape).astype(x.dtype)

    def _run(
        self,
        first: int | Int[Array, ""],
        kernels: tuple[Scaled, Scaled, Scaled],
        rows: Float[Array, "rows D"],
        experts: Int[Array, "rows k"],
        weights: Float[Array, "rows k"],
    ) -> Float[Array, "rows D"]:
        """The weighted outputs of the experts from `first` on, which have these kernels."""
        count, (num_rows, k) = len(kernels[0][0]), experts.shape
        choices = experts.reshape(-1) - first
        choices = jnp.where((choices >= 0) & (choices < count), choices, count)
        order = jnp.argsort(choices)
        sizes = jnp.sum(choices[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
        gate, up, down = kernels

        def product(x: jax.Array, scaled: Scaled) -> jax.Array:
            y, scale = grouped_matmul(x, scaled[0], sizes), scaled[1]
            if scale is None:
                return y
            # The rows of no expert are 0, whatever their scale.
            return y * jnp.take(scale, choices[order], axis=0, mode="clip").astype(y.dtype)

        x = rows.astype(self.dtype)[order // k]
        h = jax.nn.silu(product(x, gate)) * product(x, up)
        y = product(h, down)[jnp.argsort(order)]
        y = y.reshape(num_rows, k, -1).astype(upcast(self.dtype))
        return jnp.einsum("rk,rkd->rd", weights, y)

    def _within_capacity(
        self, capacity: int, experts: Int[Array, "rows k"], weights: Float[Array, "rows k"]
    ) -> Int[Array, "rows k"]:
        """The choices, of which those beyond an expert's capacity are dropped."""
        order = jnp.argsort(-weights.reshape(-1))
        chosen = jax.nn.one_hot(experts.reshape(-1)[order], self.num_experts, dtype=jnp.int32)
        rank = jnp.sum(jnp.cumsum(chosen, axis=0) * chosen, axis=-1)
        taken = (rank <= capacity)[jnp.argsort(order)].reshape(experts.shape)
        return jnp.where(taken, experts, self.num_experts)


class MixtureOfExperts(nnx.Module):
    """A router, its experts, and beside them a shared MLP that every token uses.

    Args:
      shared_dim: width of the shared MLP, None = there is none.
      capacity_factor: in training an expert takes at most this many times its even share of the
        tokens (pads count), None = no limit. It has no effect outside of training.
      The other arguments: see `Router` and `Experts`.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        shared_dim: int | None = None,
        capacity_factor: float | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = False,
        scale: float = 1.0,
        sigmoid: bool = False,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)
        self.num_experts, self.num_experts_per_token = num_experts, num_experts_per_token
        self.capacity_factor = capacity_factor
        self.router = Router(
            embed_dim,
            num_experts,
            num_experts_per_token,
            num_groups=num_groups,
            top_groups=top_groups,
            renormalize=renormalize,
            scale=scale,
            sigmoid=sigmoid,
            **kw,
        )
        self.experts = Experts(num_experts, embed_dim, mlp_dim, dtype=dtype, **kw)
        dense = shared_dim is not None
        self.shared = GatedMLP(embed_dim, shared_dim, dtype=dtype, **kw) if dense else None

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        *,
        mask: Bool[Array, "*B T"] | None = None,
        training: bool = False,
    ) -> tuple[Float[Array, "*B T D"], Routing]:
        """The output of each token's experts (and of the shared MLP), and the routing."""
        routing, capacity = self.router(x), None
        if training and self.capacity_factor is not None:
            share = math.prod(x.shape[:-1]) * self.num_experts_per_token / self.num_experts
            capacity = max(1, math.ceil(self.capacity_factor * share))
        y = self.experts(x, routing, mask=mask, capacity=capacity)
        return (y if self.shared is None else y + self.shared(x)), routing
