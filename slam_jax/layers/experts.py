"""Many gated MLPs side by side, of which each token uses a few."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from slam_jax.layers.backend import on_cpu
from slam_jax.layers.constrain import sum_over
from slam_jax.layers.expert_blocks import (
    Kernels,
    cut,
    gated_mlp,
    looped_gated_mlp,
    picked_product,
    ranks,
    read_product,
    swiglu,
    take,
)
from slam_jax.layers.linear import LECUN_NORMAL, Initializer
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.precision import wide
from slam_jax.layers.router import Router, Routing

# So few tokens that reading the kernels costs more than multiplying all of them by all tokens.
_FEW = 32


def _loops() -> bool:
    """Whether small products one after the other beat one batched product of copied kernels.

    With the latter a gradient took 1.4 and 1.5 times as long, and one token 2.6 times (2 cores of
    an Intel Xeon, 2026-11-28: python benchmarks/experts.py). An accelerator would wait between
    small ones.
    """
    return on_cpu()


class ExpertLinear(nnx.Module):
    """The kernels [E, I, O] of E linear maps; each starts like a `Linear` of its size."""

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


class Experts(nnx.Module):
    """E SwiGLU MLPs; a token's output is the weighted sum of the outputs of its chosen ones.

    Exact whatever the loads ("dropless"), unless a capacity is asked for. On many devices each runs
    its own experts on the tokens that chose them, and outputs are summed: no kernel moves.
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
        """mask: False for tokens that go nowhere and take no expert's room; their output is 0.

        capacity: tokens an expert takes; of more it leaves out those with the least weight
        (DeepSeek-V2, section 2.2.4). None = all.
        """
        k = routing.experts.shape[-1]
        rows, experts = x.reshape(-1, x.shape[-1]), routing.experts.reshape(-1, k)
        weights = routing.weights.reshape(-1, k)
        # An expert beyond the last: the choice goes nowhere.
        if mask is not None:
            experts = jnp.where(mask.reshape(-1, 1), experts, self.num_experts)
        if capacity is not None:
            experts = self._within(capacity, experts, weights)
        maps = (self.gate, self.up, self.down)
        kernels = tuple(m.kernel[...].astype(self.dtype) for m in maps)
        y = sum_over("expert", self._some, kernels, (rows, experts, weights))
        return y.reshape(x.shape).astype(x.dtype)

    def _some(self, first, kernels: Kernels, rows, experts, weights):
        """What the experts from `first` on, whose kernels these are, add to the rows."""
        here, experts = len(kernels[0]), experts - first
        experts = jnp.where((experts >= 0) & (experts < here), experts, here)
        weights = jnp.where(experts < here, weights, 0.0)
        if experts.size <= here:
            return self._by_choice(kernels, rows, experts, weights)
        if len(rows) <= _FEW:
            return self._by_token(kernels, rows, experts, weights)
        return self._by_block(kernels, rows, experts, weights)

    def _within(self, capacity: int, experts, weights):
        """The choices; those beyond an expert's capacity go nowhere."""
        order = jnp.argsort(-weights.reshape(-1))
        before, _ = ranks(experts.reshape(-1)[order], self.num_experts)
        kept = (before < capacity)[jnp.argsort(order)].reshape(experts.shape)
        return jnp.where(kept, experts, self.num_experts)

    def _by_choice(self, kernels: Kernels, rows, experts, weights):
        """For a few tokens: reads the kernels of their experts only."""
        product = read_product if _loops() else picked_product

        def by_one(_, choice):
            row, expert = choice
            gate, up, down = (functools.partial(product, kernels=m, pick=expert) for m in kernels)
            return None, down(swiglu(gate(row), up(row)))

        num_tokens, k = experts.shape
        picks = jnp.minimum(experts.reshape(-1), len(kernels[0]) - 1)
        choices = jnp.repeat(rows.astype(self.dtype), k, axis=0), picks
        if _loops():  # but not over those of one token: XLA:CPU takes long for each round
            _, y = jax.lax.scan(by_one, None, choices, unroll=k)
        else:
            _, y = jax.vmap(by_one, in_axes=(None, 0))(None, choices)
        y = y.reshape(num_tokens, k, -1).astype(wide(self.dtype))
        return jnp.einsum("rk,rkd->rd", weights, y)

    def _by_token(self, kernels: Kernels, rows, experts, weights):
        """Every expert on every token."""
        count = len(kernels[0])
        chosen = jax.nn.one_hot(experts, count, dtype=weights.dtype)
        x = jnp.broadcast_to(rows.astype(self.dtype), (count, *rows.shape))
        gate, up = (jnp.einsum("erd,edf->erf", x, kernel) for kernel in kernels[:2])
        y = jnp.einsum("erf,efd->erd", swiglu(gate, up), kernels[2]).astype(wide(self.dtype))
        return jnp.sum(jnp.einsum("rk,rke->er", weights, chosen)[..., None] * y, axis=0)

    def _by_block(self, kernels: Kernels, rows, experts, weights):
        """Each expert on its tokens, which are sorted by expert and cut into blocks."""
        num_tokens, k = experts.shape
        share = math.ceil(experts.size / self.num_experts)
        # An eighth of an expert's share: few rows are empty, and an even load is one product.
        mlp, size = (looped_gated_mlp, math.ceil(share / 8)) if _loops() else (gated_mlp, share)
        blocks = cut(experts.reshape(-1), len(kernels[0]), max(size, _FEW))
        places = blocks.places.reshape(num_tokens, k)
        x = take(rows.astype(self.dtype), blocks.choices // k, places)
        y = mlp(x, blocks, kernels)
        y = take(y.reshape(-1, y.shape[-1]), places, blocks.choices.reshape(-1, 1))
        return jnp.einsum("rk,rkd->rd", weights, y.astype(wide(y.dtype)))


class MixtureOfExperts(nnx.Module):
    """A router, its experts, and beside them a shared MLP that every token uses.

    Args:
      shared_dim: width of the shared MLP, None = there is none.
      capacity_factor: in training an expert takes at most so many times its share of the tokens,
        pads among them, None = all. Never at any other time.
      the others: of `Router` and `Experts`.
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
        """What the token's experts make of it, and which they were."""
        routing, capacity = self.router(x), None
        if training and self.capacity_factor is not None:
            share = math.prod(x.shape[:-1]) * self.num_experts_per_token / self.num_experts
            capacity = max(1, math.ceil(self.capacity_factor * share))
        y = self.experts(x, routing, mask=mask, capacity=capacity)
        return (y if self.shared is None else y + self.shared(x)), routing
