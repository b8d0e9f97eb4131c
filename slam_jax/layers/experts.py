"""Many gated MLPs side by side, of which each token uses a few."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.constrain import constrain
from slam_jax.layers.linear import LECUN_NORMAL, Initializer
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.precision import wide
from slam_jax.layers.router import Router, Routing

# Room for an expert, over its share of the tokens, before the slower way is taken.
_ROOM = 2


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
        if mask is not None:
            real = mask.reshape(-1, 1)
            # An expert beyond the last: sorted behind all others.
            experts = jnp.where(real, experts, self.num_experts)
            weights = jnp.where(real, weights, 0.0)
        if capacity is not None:
            y = self._by_expert(rows, experts, weights, capacity, by_weight=True)
        else:
            y = self._all(rows, experts, weights)
        return y.reshape(x.shape).astype(x.dtype)

    def _all(self, rows, experts, weights):
        num_tokens, k = experts.shape
        if num_tokens * k <= self.num_experts:
            return self._by_choice(rows, experts, weights)
        # XLA wants the number of tokens an expert beforehand. Twice the mean is nearly always
        # enough; where it is not, every expert sees every token, one after the other.
        room = _ROOM * math.ceil(num_tokens * k / self.num_experts)
        if room >= num_tokens:
            return self._by_expert(rows, experts, weights, num_tokens)
        loads = jax.nn.one_hot(experts, self.num_experts, dtype=jnp.int32).sum(axis=(0, 1))
        return jax.lax.cond(
            jnp.max(loads) <= room,
            lambda: self._by_expert(rows, experts, weights, room),
            lambda: self._one_by_one(rows, experts, weights),
        )

    def _by_choice(self, rows, experts, weights):
        """For a few tokens: reads the kernels of their experts only."""
        experts = jnp.minimum(experts, self.num_experts - 1)
        x = rows.astype(self.dtype)
        gate = jnp.einsum("rd,rkdf->rkf", x, self.gate.of(experts))
        up = jnp.einsum("rd,rkdf->rkf", x, self.up.of(experts))
        y = jnp.einsum("rkf,rkfd->rkd", jax.nn.silu(gate) * up, self.down.of(experts))
        return jnp.einsum("rk,rkd->rd", weights, y.astype(wide(y.dtype)))

    def _by_expert(self, rows, experts, weights, room: int, by_weight: bool = False):
        """Sorted by expert and padded to `room` tokens each: three batched matmuls.

        Forward there are only gathers. Tokens beyond the room of an expert add 0.
        """
        num_tokens, k = experts.shape
        flat = experts.reshape(-1)
        # Stable sorts: among the choices of one expert, the order they had before.
        order = jnp.argsort(-weights.reshape(-1)) if by_weight else jnp.arange(flat.size)
        order = order[jnp.argsort(flat[order])]
        first = jnp.searchsorted(flat[order], jnp.arange(self.num_experts))
        slot = jnp.argsort(order) - first[jnp.minimum(flat, self.num_experts - 1)]
        taken = jnp.minimum(first[:, None] + jnp.arange(room), flat.size - 1)
        # A slot without a token holds another's; nobody reads what comes out of it.
        x = constrain(rows[order[taken] // k].astype(self.dtype), ("expert",))
        y = constrain(self.down(jax.nn.silu(self.gate(x)) * self.up(x)), ("expert",))
        y = y.reshape(-1, rows.shape[-1])
        inside = (slot < room) & (flat < self.num_experts)
        y = y[jnp.where(inside, flat * room + slot, 0)].reshape(num_tokens, k, -1)
        weights = jnp.where(inside.reshape(num_tokens, k), weights, 0.0)
        return jnp.einsum("rk,rkd->rd", weights, y.astype(wide(y.dtype)))

    def _one_by_one(self, rows, experts, weights):
        """Every expert on every token: slow, and no larger than a dense MLP."""
        x = rows.astype(self.dtype)

        @jax.checkpoint
        def add(total, expert):
            i, gate, up, down = expert
            gate, up, down = (kernel.astype(self.dtype) for kernel in (gate, up, down))
            y = (jax.nn.silu(x @ gate) * (x @ up)) @ down
            weight = jnp.where(experts == i, weights, 0.0).sum(axis=-1)
            return total + weight[:, None] * y.astype(wide(y.dtype)), None

        kernels = (self.gate.kernel[...], self.up.kernel[...], self.down.kernel[...])
        zeros = jnp.zeros(rows.shape, wide(self.dtype))
        y, _ = jax.lax.scan(add, zeros, (jnp.arange(self.num_experts), *kernels))
        return y


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
