"""Causal attention in which groups of query heads share keys and values."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slam_jax.layers.attention import Layout, attend, causal_layout
from slam_jax.layers.kv_cache import KVCache
from slam_jax.layers.linear import LECUN_NORMAL, Initializer, Linear
from slam_jax.layers.masks import prefix_mask
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope, rotary


class GroupedQueryAttention(nnx.Module):
    """Causal self-attention with a cache of keys and values; no biases.

    `attention(x)` takes a whole sequence, `prefill` also fills an empty cache, `decode_step`
    appends one token to it; the three give the same outputs.

    Args:
      embed_dim: D. num_heads: N of queries. num_kv_heads: K, None = N, plain multi-head attention.
      head_dim: H of queries, keys and values, None = D / N.
      rope: rotation of queries and keys, None = no positions.
      qk_norm_epsilon: of RMS norms over each head of the rotated queries and keys, None = no norms
        (Hunyuan-Large, arXiv 2411.02265; Henry et al. 2020, "Query-Key Normalization").
      out_scale: scale of the initial output map, as in `GatedMLP`.

    Source: Ainslie et al. 2023, "GQA" (arXiv 2305.13245), section 2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: Rope | None = None,
        qk_norm_epsilon: float | None = None,
        out_scale: float = 1.0,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.rope, self.qk_norm_epsilon, self.dtype = rope, qk_norm_epsilon, dtype
        self.query = Linear(embed_dim, (num_heads, self.head_dim), **kw)
        self.key = Linear(embed_dim, (self.num_kv_heads, self.head_dim), **kw)
        self.value = Linear(embed_dim, (self.num_kv_heads, self.head_dim), **kw)
        self.out = Linear((num_heads, self.head_dim), embed_dim, init_scale=out_scale, **kw)
        if qk_norm_epsilon is not None:
            norm: Any = dict(epsilon=qk_norm_epsilon, param_dtype=param_dtype)
            self.q_norm = RMSNorm(self.head_dim, **norm)
            self.k_norm = RMSNorm(self.head_dim, **norm)

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> KVCache:
        """An empty cache for rows of `batch_shape`, each of at most `max_length` tokens."""
        return KVCache.empty(batch_shape, max_length, self.num_kv_heads, self.head_dim, self.dtype)

    def __call__(
        self, x: Float[Array, "*B T D"], layout: Layout | None = None
    ) -> Float[Array, "*B T D"]:
        """Every token attends to itself and to those before it; `layout`: where the pads are."""
        layout = layout or causal_layout(x.shape[-2])
        q, k, v = self._project(x, layout.positions)
        return self.out(attend(q, k, v, layout.visible))

    def prefill(
        self, x: Float[Array, "*B T D"], cache: KVCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], KVCache]:
        """`self(x)`, and the cache with x in it; `cache` must be empty.

        lengths: real tokens of each right-padded row, None = all T. Raises InputError where T
        exceeds the capacity of the cache.
        """
        layout = causal_layout(x.shape[-2])
        q, k, v = self._project(x, layout.positions)
        return self.out(attend(q, k, v, layout.visible)), cache.filled(k, v, lengths)

    def decode_step(
        self, x: Float[Array, "*B 1 D"], cache: KVCache
    ) -> tuple[Float[Array, "*B 1 D"], KVCache]:
        """The output of one more token per row, and the cache with that token.

        Raises InputError where a row is full; under `jax.jit` see `KVCache`.
        """
        positions = cache.length[..., None]
        q, k, v = self._project(x, positions)
        cache = cache.extended(k, v)
        visible = prefix_mask(positions + 1, cache.capacity)
        return self.out(attend(q, *cache.tokens_first(), visible)), cache

    def _project(self, x, positions):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rope is not None:
            q, k = rotary(q, positions, self.rope), rotary(k, positions, self.rope)
        if self.qk_norm_epsilon is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
