"""Multi-head latent attention: the cache stores one small latent per token.

Source: DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434), sections 2.1.2 (low-rank joint
compression), 2.1.3 (decoupled rotary key) and appendix C (the absorbed form).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from slam_jax.errors import require, require_count
from slam_jax.kernels import fused_attention
from slam_jax.layers.attention import Layout, causal_layout, masked_softmax
from slam_jax.layers.kv_cache import (
    entries_in_window,
    new_positions,
    visible_entries,
    write_prompt,
    write_token,
    write_tokens,
)
from slam_jax.layers.linear import LECUN_NORMAL, Initializer, Linear, project
from slam_jax.layers.masks import Mask, as_array, in_window, require_square
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.precision import upcast
from slam_jax.layers.rotary import Rope, rotary


@struct.dataclass
class LatentCache:
    """The cache of one layer: R + H_r numbers per token, right-padded to a fixed capacity T.

    c_kv: normed latents, from which the keys and values of all heads are computed.
    k_rope: the rotated key that all heads share.
    length: number of tokens of each row; entries at and beyond it are never attended to.

    A row is full when its length is T. Outside of `jax.jit`, another token raises InputError. Under
    `jax.jit` it is not stored and its output is wrong; `length > capacity` shows it. In a layer
    with a window of at most T tokens the cache is a ring (see `is_ring`), which is never full.
    """

    c_kv: Float[Array, "*B T R"]
    k_rope: Float[Array, "*B T H_r"]
    length: Int[Array, "*B"]

    @classmethod
    def empty(
        cls, batch_shape: tuple[int, ...], max_length: int, rank: int, rope_dim: int, dtype
    ) -> "LatentCache":
        return cls(
            c_kv=jnp.zeros((*batch_shape, max_length, rank), dtype),
            k_rope=jnp.zeros((*batch_shape, max_length, rope_dim), dtype),
            length=jnp.zeros(batch_shape, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """T, the number of tokens that a row has room for."""
        return self.c_kv.shape[-2]

    def filled(
        self, c_kv, k_rope, lengths: Int[Array, "*B"] | None, window: int | None = None
    ) -> "LatentCache":
        """This empty cache with right-padded prompts of `lengths` tokens (None = all t) in it."""
        buffers, prompts = (self.c_kv, self.k_rope), (c_kv, k_rope)
        return LatentCache(*write_prompt(buffers, prompts, self.length, lengths, window))

    def extended(self, c_kv, k_rope, window: int | None = None) -> "LatentCache":
        """This cache with one more token per row. Raises InputError as `write_token` does."""
        buffers, tokens = (self.c_kv, self.k_rope), (c_kv, k_rope)
        return LatentCache(*write_token(buffers, tokens, self.length, window))

    def appended(
        self,
        c_kv: Float[Array, "*B t R"],
        k_rope: Float[Array, "*B t H_r"],
        lengths: Int[Array, "*B"] | None,
        window: int | None = None,
    ) -> tuple[tuple[Float[Array, "*B T_t R"], Float[Array, "*B T_t H_r"]], "LatentCache"]:
        """The latents and rotated keys that t new tokens attend to, and this cache with `lengths`
        of them (None = all t) in each row; see `KVCache.appended`."""
        buffers, tokens = (self.c_kv, self.k_rope), (c_kv, k_rope)
        written = LatentCache(*write_tokens(buffers, tokens, self.length, lengths, window))
        pairs = zip(buffers, tokens, strict=True)
        c_kv, k_rope = (jnp.concatenate(pair, axis=-2) for pair in pairs)
        return (c_kv, k_rope), written


def latent_attention_weights(
    q: Float[Array, "*B T N H"],
    latents: Float[Array, "*B S R"],
    w_uk: Float[Array, "R N H"],
    *,
    q_rope: Float[Array, "*B T N H_r"] | None = None,
    k_rope: Float[Array, "*B S H_r"] | None = None,
    mask: Mask = None,
    score_scale: float = 1.0,
    absorbed: bool,
) -> Float[Array, "*B N T S"]:
    """The weight of each latent for each query, float32 or wider; arguments as in
    `latent_attend`."""
    sums = dict(preferred_element_type=upcast(q.dtype))
    visible = as_array(mask, q.shape[-3], latents.shape[-2])
    width = q.shape[-1] + (0 if q_rope is None else q_rope.shape[-1])
    # Heads first throughout, as in `attend`.
    if absorbed:
        q = jnp.einsum("...tnh,rnh->...ntr", q, w_uk)
        # With latents on the left, XLA transposes the few queries and not the latents.
        logits = jnp.einsum("...sr,...ntr->...snt", latents, q, **sums)
        logits = jnp.moveaxis(logits, -3, -1)
    else:
        q, k = jnp.swapaxes(q, -2, -3), jnp.swapaxes(project(latents, w_uk), -2, -3)
        logits = jnp.einsum("...nth,...nsh->...nts", q, k, **sums)
    if q_rope is not None:
        q_rope = jnp.swapaxes(q_rope, -2, -3)
        logits += jnp.einsum("...nth,...sh->...nts", q_rope, k_rope, **sums)
    visible = None if visible is None else visible[..., None, :, :]
    return masked_softmax(logits * (score_scale * width**-0.5), visible)


def latent_attend(
    q: Float[Array, "*B T N H"],
    latents: Float[Array, "*B S R"],
    w_uk: Float[Array, "R N H"],
    w_uv: Float[Array, "R N H_v"],
    *,
    q_rope: Float[Array, "*B T N H_r"] | None = None,
    k_rope: Float[Array, "*B S H_r"] | None = None,
    mask: Mask = None,
    score_scale: float = 1.0,
    absorbed: bool,
) -> Float[Array, "*B T N H_v"]:
    """Attention with keys `latents @ w_uk`, joined by the shared `k_rope`, and values
    `latents @ w_uv`.

    There are two forms, equal in exact arithmetic. Expanded: compute every key and value; cheapest
    with many queries. Absorbed: multiply the queries by `w_uk` instead, so that a decoding step
    reads R numbers per token and not N * (H + H_v). Both scale the scores by the expanded key width
    H + H_r and by `score_scale` (see `Rope`).
    """
    width = q.shape[-1] + (0 if q_rope is None else q_rope.shape[-1])
    require_square(mask, q.shape[-3], latents.shape[-2])
    widest = max(width, w_uv.shape[-1])
    kernel = fused_attention.kernel_of(q, latents.shape[-2], widest, mask)
    if kernel is not None and not absorbed:
        k, v = project(latents, w_uk), project(latents, w_uv)
        if q_rope is not None and k_rope is not None:
            shared = jnp.broadcast_to(k_rope[..., None, :], (*k.shape[:-1], k_rope.shape[-1]))
            q, k = jnp.concatenate([q, q_rope], -1), jnp.concatenate([k, shared], -1)
        scale = score_scale * width**-0.5
        return fused_attention.fused_attend(q, k, v, mask, kernel, scale=scale)
    kw: Any = dict(q_rope=q_rope, k_rope=k_rope, mask=mask, score_scale=score_scale)
    probs = latent_attention_weights(q, latents, w_uk, **kw, absorbed=absorbed)
    probs = probs.astype(latents.dtype)
    if absorbed:
        mixed = jnp.einsum("...nts,...sr->...ntr", probs, latents)
        return jnp.einsum("...ntr,rnv->...tnv", mixed, w_uv)
    v = jnp.swapaxes(project(latents, w_uv), -2, -3)
    return jnp.swapaxes(jnp.einsum("...nts,...nsv->...ntv", probs, v), -2, -3)


class MultiHeadLatentAttention(nnx.Module):
    """Causal self-attention with a latent cache.

    `mla(x)` takes a whole sequence, `prefill` also fills an empty cache, `append` continues one
    with several tokens and `decode_step` with one; the four give the same outputs. Nothing here is
    sharded by `constrain`: place the parameters and the rows, and XLA divides the work.

    Args:
      embed_dim: D. num_heads: N.
      kv_lora_rank: R, the latent width. q_lora_rank: rank of the queries, None = full.
      qk_nope_head_dim: H, width of a head's keys without positions. qk_rope_head_dim: H_r, the
        rotary part (even). v_head_dim: H_v, width of a head's values.
      rope: rotation of the rotary part.
      window: a token attends to itself and the window - 1 tokens before it; None = all.
      out_scale: scale of the initial output map, as in `GatedMLP`.
      dtype: of products, outputs and the cache. param_dtype: of parameters.

    Parameters: `q_nope` [D, N, H] and `q_rope` [D, N, H_r] (with `q_lora_rank` R_q they are
    [R_q, N, ..] and follow `q_down` [D, R_q] and `q_norm` [R_q]); `kv_down` [D, R], `kv_norm` [R],
    `k_rope` [D, H_r]; `k_up` [R, N, H] and `v_up` [R, N, H_v]; `out` [N, H_v, D]. The published
    weights of DeepSeek rotate interleaved pairs; see `Rope`.

    Raises ConfigError where window is less than 1 or qk_rope_head_dim is odd.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: Rope = Rope(),
        window: int | None = None,
        out_scale: float = 1.0,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if window is not None:
            require_count("window", window)
        require(qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", qk_rope_head_dim, "an even number")
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.q_lora_rank = q_lora_rank
        self.window, self.rope, self.dtype = window, rope, dtype
        q_width = embed_dim
        if q_lora_rank is not None:
            self.q_down = Linear(embed_dim, q_lora_rank, **kw)
            self.q_norm = RMSNorm(q_lora_rank, param_dtype=param_dtype)
            q_width = q_lora_rank
        self.q_nope = Linear(q_width, (num_heads, qk_nope_head_dim), **kw)
        self.q_rope = Linear(q_width, (num_heads, qk_rope_head_dim), **kw)
        self.kv_down = Linear(embed_dim, kv_lora_rank, **kw)
        self.k_rope = Linear(embed_dim, qk_rope_head_dim, **kw)
        self.kv_norm = RMSNorm(kv_lora_rank, param_dtype=param_dtype)
        self.k_up = Linear(kv_lora_rank, (num_heads, qk_nope_head_dim), **kw)
        self.v_up = Linear(kv_lora_rank, (num_heads, v_head_dim), **kw)
        heads = (num_heads, v_head_dim)
        self.out = Linear(heads, embed_dim, init_scale=out_scale, **kw)

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> LatentCache:
        """An empty cache for rows of `batch_shape`, each of at most `max_length` tokens.

        Its capacity is `max_length`, or the window where that is smaller: then rows may be longer.
        """
        widths = (self.kv_lora_rank, self.qk_rope_head_dim)
        capacity = max_length if self.window is None else min(max_length, self.window)
        return LatentCache.empty(batch_shape, capacity, *widths, self.dtype)

    def __call__(
        self, x: Float[Array, "*B T D"], layout: Layout | None = None
    ) -> Float[Array, "*B T D"]:
        """Every token attends to itself and to the tokens before it (in its window).

        layout: where the pads are, None = no pads; `causal_layout(T, mask)` makes one of a mask.
        Outputs at pads are finite and have no meaning.
        """
        return self._full(x, layout or causal_layout(x.shape[-2]))[0]

    def prefill(
        self, x: Float[Array, "*B T D"], cache: LatentCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], LatentCache]:
        """`self(x)`, and the cache with x in it; `cache` must be empty.

        lengths: real tokens of each right-padded row, 1 to T; None = all T.

        Raises InputError where T exceeds the capacity of the cache, unless the cache is a ring, and
        where the cache has other rows or is not empty. Under `jax.jit` the tokens of a cache that
        is not empty are overwritten.
        """
        y, c_kv, k_rope = self._full(x, causal_layout(x.shape[-2]))
        return y, cache.filled(c_kv, k_rope, lengths, self.window)

    def append(
        self, x: Float[Array, "*B T D"], cache: LatentCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], LatentCache]:
        """The outputs of T more tokens per row, and the cache with these tokens; see
        `GroupedQueryAttention.append`. Computes the keys and values of all latents (expanded)."""
        num_tokens, capacity = x.shape[-2], cache.capacity
        visible = visible_entries(cache.length, num_tokens, capacity, self.window)
        positions = new_positions(cache.length, num_tokens)
        q, q_rope, c_kv, k_rope = self._project(x, positions)
        (c_kv, k_rope), cache = cache.appended(c_kv, k_rope, lengths, self.window)
        return self._attend(q, q_rope, c_kv, k_rope, visible, absorbed=False), cache

    def decode_step(
        self, x: Float[Array, "*B 1 D"], cache: LatentCache, *, absorbed: bool = True
    ) -> tuple[Float[Array, "*B 1 D"], LatentCache]:
        """The output of one more token per row, and the cache with that token.

        `absorbed=False` recomputes all keys and values, for comparison. Raises InputError where a
        row is full; under `jax.jit` see `KVCache`.
        """
        positions = cache.length[..., None]
        q, q_rope, c_kv, k_rope = self._project(x, positions)
        cache = cache.extended(c_kv, k_rope, self.window)
        mask = entries_in_window(positions + 1, cache.capacity, self.window)
        y = self._attend(q, q_rope, cache.c_kv, cache.k_rope, mask, absorbed)
        return y, cache

    def _full(self, x, layout):
        q, q_rope, c_kv, k_rope = self._project(x, layout.positions)
        mask = in_window(layout.visible, x.shape[-2], self.window)
        return self._attend(q, q_rope, c_kv, k_rope, mask, absorbed=False), c_kv, k_rope

    def _project(self, x, positions):
        latent = x if self.q_lora_rank is None else self.q_norm(self.q_down(x))
        q_rope = rotary(self.q_rope(latent), positions, self.rope)
        k_rope = rotary(self.k_rope(x)[..., None, :], positions, self.rope)[..., 0, :]
        return self.q_nope(latent), q_rope, self.kv_norm(self.kv_down(x)), k_rope

    def _attend(self, q, q_rope, c_kv, k_rope, mask, absorbed):
        k_up, v_up = (up.weight.astype(self.dtype) for up in (self.k_up, self.v_up))
        kw: Any = dict(q_rope=q_rope, k_rope=k_rope, mask=mask, score_scale=self.rope.score_scale)
        return self.out(latent_attend(q, c_kv, k_up, v_up, **kw, absorbed=absorbed))


class LatentCrossAttention(nnx.Module):
    """Attention to given latents, with its own up-projections and without positions.

    The compression of `MultiHeadLatentAttention`, for tokens that do not change during generation.

    Args:
      embed_dim: D of x. num_heads: N.
      kv_lora_rank: R of the latents. qk_head_dim: H of queries and keys. v_head_dim: H_v of values.
      out_scale: scale of the initial output map, as in `GatedMLP`.

    Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2, read across as in Vaswani et al. 2017,
    section 3.2.3.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_head_dim: int,
        v_head_dim: int,
        out_scale: float = 1.0,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.q = Linear(embed_dim, (num_heads, qk_head_dim), **kw)
        self.k_up = Linear(kv_lora_rank, (num_heads, qk_head_dim), **kw)
        self.v_up = Linear(kv_lora_rank, (num_heads, v_head_dim), **kw)
        heads = (num_heads, v_head_dim)
        self.out = Linear(heads, embed_dim, init_scale=out_scale, **kw)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        latents: Float[Array, "*B S R"],
        mask: Bool[Array, "*#B #T S"] | None = None,
        *,
        absorbed: bool = False,
    ) -> Float[Array, "*B T D"]:
        """What the tokens of x read from the latents; 0 for a row whose latents are all masked."""
        k_up, v_up = (up.weight.astype(self.dtype) for up in (self.k_up, self.v_up))
        return self.out(latent_attend(self.q(x), latents, k_up, v_up, mask=mask, absorbed=absorbed))

    def weights(
        self,
        x: Float[Array, "*B T D"],
        latents: Float[Array, "*B S R"],
        mask: Bool[Array, "*#B #T S"] | None = None,
    ) -> Float[Array, "*B N T S"]:
        """The attention weights of the same call."""
        k_up = self.k_up.weight.astype(self.dtype)
        return latent_attention_weights(self.q(x), latents, k_up, mask=mask, absorbed=False)
