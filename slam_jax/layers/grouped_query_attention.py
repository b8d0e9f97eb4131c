"""Causal attention in which groups of query heads share keys and values."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slam_jax.errors import require_count
from slam_jax.layers.attention import Layout, attend, causal_layout
from slam_jax.layers.kv_cache import (
    KVCache,
    entries_in_window,
    new_positions,
    visible_entries,
)
from slam_jax.layers.linear import LECUN_NORMAL, Initializer, Linear
from slam_jax.layers.masks import Causal, in_window
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope, rotary


class GroupedQueryAttention(nnx.Module):
    """Causal self-attention with a cache of keys and values.

    `attention(x)` takes a whole sequence, `prefill` also fills an empty cache, `append` continues
    one with several tokens and `decode_step` with one; the four give the same outputs.

    Args:
      embed_dim: D. num_heads: N of queries. num_kv_heads: K, None = N, plain multi-head attention.
      head_dim: H of queries, keys and values, None = D / N.
      rope: rotation of queries and keys, None = no positions.
      qk_norm_epsilon: of RMS norms over each head of the queries and keys, None = no norms (Henry
        et al. 2020, "Query-Key Normalization"). rotate_first: the norms come after the rotation, as
        in Hunyuan-Large (arXiv 2411.02265), not before it, as in Qwen3 (arXiv 2505.09388).
      qkv_bias, out_bias: biases of the maps to queries, keys and values, and of the output map.
      window: a token attends to itself and the window - 1 tokens before it; None = all.
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
        rotate_first: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        window: int | None = None,
        out_scale: float = 1.0,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if window is not None:
            require_count("window", window)
        kw: Any = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.rope, self.qk_norm_epsilon, self.dtype = rope, qk_norm_epsilon, dtype
        self.rotate_first, self.window = rotate_first, window
        kv_heads, heads = (self.num_kv_heads, self.head_dim), (num_heads, self.head_dim)
        self.query = Linear(embed_dim, heads, use_bias=qkv_bias, **kw)
        self.key = Linear(embed_dim, kv_heads, use_bias=qkv_bias, **kw)
        self.value = Linear(embed_dim, kv_heads, use_bias=qkv_bias, **kw)
        self.out = Linear(heads, embed_dim, use_bias=out_bias, init_scale=out_scale, **kw)
        if qk_norm_epsilon is not None:
            norm: Any = dict(epsilon=qk_norm_epsilon, param_dtype=param_dtype)
            self.q_norm = RMSNorm(self.head_dim, **norm)
            self.k_norm = RMSNorm(self.head_dim, **norm)

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> KVCache:
        """An empty cache for rows of `batch_shape`, each of at most `max_length` tokens.

        Its capacity is `max_length`, or the window where that is smaller: then rows may be longer.
        """
        capacity = max_length if self.window is None else min(max_length, self.window)
        return KVCache.empty(batch_shape, capacity, self.num_kv_heads, self.head_dim, self.dtype)

    def __call__(
        self, x: Float[Array, "*B T D"], layout: Layout | None = None
    ) -> Float[Array, "*B T D"]:
        """Every token attends to itself and to those before it; `layout`: where the pads are."""
        layout = layout or causal_layout(x.shape[-2])
        q, k, v = self._project(x, layout.positions)
        return self.out(attend(q, k, v, in_window(layout.visible, x.shape[-2], self.window)))

    def prefill(
        self, x: Float[Array, "*B T D"], cache: KVCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], KVCache]:
        """`self(x)`, and the cache with x in it; `cache` must be empty.

        lengths: real tokens of each right-padded row, None = all T. Raises InputError where T
        exceeds the capacity of the cache.
        """
        layout = causal_layout(x.shape[-2])
        q, k, v = self._project(x, layout.positions)
        y = self.out(attend(q, k, v, Causal(self.window)))
        return y, cache.filled(k, v, lengths, self.window)

    def append(
        self, x: Float[Array, "*B T D"], cache: KVCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], KVCache]:
        """The outputs of T more tokens per row, which attend to the tokens of the cache, to
        themselves and to those before them, and the cache with these tokens.

        lengths: real tokens of each right-padded row, 0 to T; None = all T. Raises InputError where
        a row has no room; under `jax.jit` see `KVCache`.
        """
        num_tokens, capacity = x.shape[-2], cache.capacity
        visible = visible_entries(cache.length, num_tokens, capacity, self.window)
        q, k, v = self._project(x, new_positions(cache.length, num_tokens))
        (k, v), cache = cache.appended(k, v, lengths, self.window)
        return self.out(attend(q, k, v, visible)), cache

    def decode_step(
        self, x: Float[Array, "*B 1 D"], cache: KVCache
    ) -> tuple[Float[Array, "*B 1 D"], KVCache]:
        """The output of one more token per row, and the cache with that token.

        Raises InputError where a row is full; under `jax.jit` see `KVCache`.
        """
        positions = cache.length[..., None]
        q, k, v = self._project(x, positions)
        cache = cache.extended(k, v, self.window)
        visible = entries_in_window(positions + 1, cache.capacity, self.window)
        return self.out(attend(q, *cache.tokens_first(), visible)), cache

    def _project(self, x, positions):
        q, k, v = self.query(x), self.key(x), self.value(x)
        has_norms = self.qk_norm_epsilon is not None
        if has_norms and not self.rotate_first:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = rotary(q, positions, self.rope), rotary(k, positions, self.rope)
        if has_norms and self.rotate_first:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
