"""Many gated MLPs side by side, of which each token uses a few."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.expert_blocks import cut, gated_mlp, looped_gated_mlp, ranks, take
from slam_jax.layers.linear import LECUN_NORMAL, Initializer
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.precision import wide
from slam_jax.layers.router import Router, Routing

# So few tokens that reading the kernels costs more than multiplying all of them by all tokens.
_FEW = 32


_FOR_ACCELERATORS = contextvars.ContextVar("_FOR_ACCELERATORS", default=False)


@contextlib.contextmanager
def for_accelerators() -> Iterator[None]:
    """Within it a program is traced as for an accelerator, also on a CPU that stands for one."""
    token = _FOR_ACCELERATORS.set(True)
    try:
        yield
    finally:
        _FOR_ACCELERATORS.reset(token)


def _loops() -> bool:
    """Whether small products one after the other beat one batched product of copied kernels.

    There a gradient took 2.4 times as long (2 cores of an Intel Xeon, 2026-11-26: python
    benchmarks/experts.py); an accelerator would wait between small ones.
    """
    return jax.default_backend() == "cpu" and not _FOR_ACCELERATORS.get()


class ExpertLinear(nnx.Module):
    """E linear maps: [E, .., I] -> [E, .., O]; each starts like a `Linear` of its size."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        keys = jax.random.split(rngs.params(), num_experts)
        shape = (in_features, out_features)
        self.kernel = nnx.Param(jax.vmap(lambda key: kernel_init(key, shape, param_dtype))(keys))

    def __call__(self, x: Float[Array, "E C I"]) -> Float[Array, "E C O"]:
        return jnp.einsum("eci,eio->eco", x, self.kernel[...].astype(self.dtype))

    def of(self, experts: Int[Array, "*R"]) -> Float[Array, "*R I O"]:
        """The kernels of some experts."""
        return self.kernel[...][experts].astype(self.dtype)


class Experts(nnx.Module):
    """E SwiGLU MLPs; a token's output is the weighted sum of the outputs of its chosen ones.

    Exact whatever the loads ("dropless"), unless a capacity is asked for.
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
        kw: Any = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
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
        weights = jnp.where(experts < self.num_experts, weights, 0.0)
        if experts.size <= self.num_experts:
            y = self._by_choice(rows, experts, weights)
        elif len(rows) <= _FEW:
            y = self._by_token(rows, experts, weights)
        else:
            y = self._by_block(rows, experts, weights)
        return y.reshape(x.shape).astype(x.dtype)

    def _within(self, capacity: int, experts, weights):
        """The choices; those beyond an expert's capacity go nowhere."""
        order = jnp.argsort(-weights.reshape(-1))
        before, _ = ranks(experts.reshape(-1)[order], self.num_experts)
        kept = (before < capacity)[jnp.argsort(order)].reshape(experts.shape)
        return jnp.where(kept, experts, self.num_experts)

    def _by_choice(self, rows, experts, weights):
        """For a few tokens: reads the kernels of their experts only."""
        experts = jnp.minimum(experts, self.num_experts - 1)
        x = rows.astype(self.dtype)
        gate = jnp.einsum("rd,rkdf->rkf", x, self.gate.of(experts))
        up = jnp.einsum("rd,rkdf->rkf", x, self.up.of(experts))
        y = jnp.einsum("rkf,rkfd->rkd", jax.nn.silu(gate) * up, self.down.of(experts))
        return jnp.einsum("rk,rkd->rd", weights, y.astype(wide(y.dtype)))

    def _by_token(self, rows, experts, weights):
        """Every expert on every token."""
        chosen = jax.nn.one_hot(experts, self.num_experts, dtype=weights.dtype)
        x = jnp.broadcast_to(rows.astype(self.dtype), (self.num_experts, *rows.shape))
        y = self.down(jax.nn.silu(self.gate(x)) * self.up(x)).astype(wide(self.dtype))
        return jnp.sum(jnp.einsum("rk,rke->er", weights, chosen)[..., None] * y, axis=0)

    def _by_block(self, rows, experts, weights):
        """Each expert on its tokens, which are sorted by expert and cut into blocks."""
        num_tokens, k = experts.shape
        # A fourth of an expert's share leaves an eighth of the rows empty; less is slower again.
        share = math.ceil(experts.size / self.num_experts)
        mlp, size = (looped_gated_mlp, math.ceil(share / 4)) if _loops() else (gated_mlp, share)
        blocks = cut(experts.reshape(-1), self.num_experts, max(size, _FEW))
        places = blocks.places.reshape(num_tokens, k)
        gate, up, down = (m.kernel[...].astype(self.dtype) for m in (self.gate, self.up, self.down))
        x = take(rows.astype(self.dtype), blocks.choices // k, places)
        y = mlp(x, blocks.owners, (gate, up, down))
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
