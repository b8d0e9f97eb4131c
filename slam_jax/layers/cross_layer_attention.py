"""Cross-layer attention: several layers read keys and values that are computed and cached once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slam_jax.layers.attention import Layout, attend, causal_layout
from slam_jax.layers.kv_cache import KVCache, new_positions, visible_entries
from slam_jax.layers.linear import LECUN_NORMAL, Initializer, Linear
from slam_jax.layers.masks import Mask, prefix_mask
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope, rotary


class KeyValues(NamedTuple):
    """Keys and values, before a reader rotates or norms them.

    positions: position of each key in its row. visible: the keys that the queries may attend to.
    """

    k: Float[Array, "*B S K H"]
    v: Float[Array, "*B S K H"]
    positions: Int[Array, "*#B S"]
    visible: Mask


class SharedKeyValues(nnx.Module):
    """Computes the keys and values that several layers read, and their one cache.

    It has the methods of an attention layer, but they return `KeyValues`. embed_dim: D.
    num_kv_heads: K. head_dim: H.

    Source: Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer
    Attention" (arXiv 2405.12981), section 2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_kv_heads, self.head_dim, self.dtype = num_kv_heads, head_dim, dtype
        self.key = Linear(embed_dim, (num_kv_heads, head_dim), **kw)
        self.value = Linear(embed_dim, (num_kv_heads, head_dim), **kw)

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> KVCache:
        """An empty cache for rows of `batch_shape`, each of at most `max_length` tokens."""
        return KVCache.empty(batch_shape, max_length, self.num_kv_heads, self.head_dim, self.dtype)

    def __call__(self, x: Float[Array, "*B T D"], layout: Layout | None = None) -> KeyValues:
        layout = layout or causal_layout(x.shape[-2])
        return KeyValues(self.key(x), self.value(x), layout.positions, layout.visible)

    def prefill(
        self, x: Float[Array, "*B T D"], cache: KVCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[KeyValues, KVCache]:
        """`self(x)`, and the cache with it; see `GroupedQueryAttention.prefill`."""
        shared = self(x)
        return shared, cache.filled(shared.k, shared.v, lengths)

    def append(
        self, x: Float[Array, "*B T D"], cache: KVCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[KeyValues, KVCache]:
        """The keys and values of the cache and of T more tokens per row, and the cache with these
        tokens; see `GroupedQueryAttention.append`."""
        new = new_positions(cache.length, x.shape[-2])
        visible = visible_entries(cache.length, x.shape[-2], cache.capacity, None)
        slots = jnp.broadcast_to(jnp.arange(cache.capacity), (*cache.length.shape, cache.capacity))
        positions = jnp.concatenate([slots, new], axis=-1)
        (k, v), cache = cache.appended(self.key(x), self.value(x), lengths)
        return KeyValues(k, v, positions, visible), cache

    def decode_step(self, x: Float[Array, "*B 1 D"], cache: KVCache) -> tuple[KeyValues, KVCache]:
        """All keys and values of the cache, with one more token per row; see
        `GroupedQueryAttention.decode_step`."""
        positions = cache.length[..., None]
        cache = cache.extended(self.key(x), self.value(x))
        slots = jnp.arange(cache.capacity)
        visible = prefix_mask(positions + 1, cache.capacity)
        return KeyValues(*cache.tokens_first(), slots, visible), cache


class CrossLayerAttention(nnx.Module):
    """A reader of `KeyValues`: own queries and output map, shared keys and values.

    rope, qk_norm_epsilon: as in `GroupedQueryAttention`; each reader rotates and norms by itself.
    query_bias: adds a learned vector to the queries.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        rope: Rope | None = None,
        qk_norm_epsilon: float | None = None,
        query_bias: bool = False,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.rope, self.qk_norm_epsilon = rope, qk_norm_epsilon
        self.query = Linear(embed_dim, (num_heads, head_dim), **kw)
        normal, shape = nnx.initializers.normal(0.02), (num_heads, head_dim)
        self.query_bias = (
            nnx.Param(normal(rngs.params(), shape, param_dtype)) if query_bias else None
        )
        self.out = Linear((num_heads, head_dim), embed_dim, **kw)
        if qk_norm_epsilon is not None:
            norm: Any = dict(epsilon=qk_norm_epsilon, param_dtype=param_dtype)
            self.q_norm, self.k_norm = RMSNorm(head_dim, **norm), RMSNorm(head_dim, **norm)

    def __call__(
        self, x: Float[Array, "*B T D"], shared: KeyValues, positions: Int[Array, "*#B T"]
    ) -> Float[Array, "*B T D"]:
        """positions: position of each token of x."""
        q, k = self.query(x), shared.k
        if self.query_bias is not None:
            q = q + jax.lax.broadcast_to_rank(self.query_bias[...].astype(q.dtype), q.ndim)
        if self.rope is not None:
            q, k = rotary(q, positions, self.rope), rotary(k, shared.positions, self.rope)
        if self.qk_norm_epsilon is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.out(attend(q, k, shared.v, shared.visible))
