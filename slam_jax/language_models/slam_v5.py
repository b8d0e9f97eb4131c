"""SLAM v5, "Cutting-Edge": v4 with the parts of today's language models.

**This definition is ours.** No source was published; it is v4 with RMSNorm, rotary positions,
SwiGLU and multi-head latent attention. What level 1 gives the four EF blocks is then one latent for
each token. All four blocks share the keys and values made from it; each has its own queries, with
its own bias.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from slam_jax.language_models.base import ParallelBlocks, PreNormBlock, Transformer, rms_norm
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.attention import Layout, causal_layout
from slam_jax.layers.kv_cache import new_positions, visible_entries
from slam_jax.layers.latent_attention import LatentCache, MultiHeadLatentAttention, latent_attend
from slam_jax.layers.linear import Linear
from slam_jax.layers.masks import prefix_mask
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import rotary
from slam_jax.layers.stacked import repeat

LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV5Config(LanguageModelConfig):
    """kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: see `MultiHeadLatentAttention`.
    level_layers: layers of level 1, and as many of level 3. num_blocks: parallel blocks of level 2.
    """

    mlp_dim: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    level_layers: int = 2
    num_blocks: int = 4

    def body_flops(self, num_tokens: int) -> int:
        dim, heads, latent = self.embed_dim, self.num_heads, self.sizes(*LATENT)
        mlp = flops.gated_mlp(num_tokens, dim, self.mlp_dim)
        attention, reader = (
            flops.latent_attention(num_tokens, dim, heads, **latent, own_keys=own_keys)
            for own_keys in (True, False)
        )
        layers = 2 * self.level_layers * (attention + mlp)
        return layers + (attention - reader) + self.num_blocks * (reader + mlp)


class Latents(nnx.Module):
    """The latents of level 1: called as a token mixer, it returns a function that reads them."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        kw, rank, heads = config.options(rngs), config.kv_lora_rank, config.num_heads
        self.rank, self.rope_dim, self.dtype = rank, config.qk_rope_head_dim, kw["dtype"]
        self.down = Linear(config.embed_dim, rank, **kw)
        self.norm = RMSNorm(rank, param_dtype=kw["param_dtype"])
        self.k_rope = Linear(config.embed_dim, config.qk_rope_head_dim, **kw)
        self.k_up = Linear(rank, (heads, config.qk_nope_head_dim), **kw)
        self.v_up = Linear(rank, (heads, config.v_head_dim), **kw)

    def init_cache(self, batch_shape, max_length) -> LatentCache:
        return LatentCache.empty(batch_shape, max_length, self.rank, self.rope_dim, self.dtype)

    def __call__(self, x, layout: Layout):
        return self._bank(*self._latents(x, layout.positions), layout.visible, absorbed=False)

    def prefill(self, x, cache: LatentCache, lengths):
        layout = causal_layout(x.shape[-2])
        latents = self._latents(x, layout.positions)
        cache = cache.filled(*latents, lengths)
        return self._bank(*latents, layout.visible, absorbed=False), cache

    def append(self, x, cache: LatentCache, lengths):
        num_tokens = x.shape[-2]
        visible = visible_entries(cache.length, num_tokens, cache.capacity, None)
        latents = self._latents(x, new_positions(cache.length, num_tokens))
        latents, cache = cache.appended(*latents, lengths)
        return self._bank(*latents, visible, absorbed=False), cache

    def decode_step(self, x, cache: LatentCache):
        positions = cache.length[..., None]
        cache = cache.extended(*self._latents(x, positions))
        visible = prefix_mask(positions + 1, cache.capacity)
        return self._bank(cache.c_kv, cache.k_rope, visible, absorbed=True), cache

    def _latents(self, x, positions):
        k_rope = rotary(self.k_rope(x)[..., None, :], positions)[..., 0, :]
        return self.norm(self.down(x)), k_rope

    def _bank(self, c_kv, k_rope, visible, absorbed):
        """A function of the queries that returns what they read from the latents."""
        k_up, v_up = (up.weight.astype(self.dtype) for up in (self.k_up, self.v_up))
        bank: Any = dict(latents=c_kv, w_uk=k_up, w_uv=v_up, k_rope=k_rope)
        return functools.partial(latent_attend, **bank, mask=visible, absorbed=absorbed)


def layer(config: SlamV5Config, *, rngs: nnx.Rngs) -> PreNormBlock:
    """A layer of level 1 or 3."""
    dim, kw, latent = config.embed_dim, config.options(rngs), config.sizes("num_heads", *LATENT)
    return PreNormBlock(
        config,
        attention=MultiHeadLatentAttention(dim, **latent, **kw),
        mlp=GatedMLP(dim, config.mlp_dim, **kw),
    )


class EFBlock(nnx.Module):
    """A block of level 2: h += attention to level 1 with a query bias; h += mlp(norm(h))."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        dim, heads, kw = config.embed_dim, config.num_heads, config.options(rngs)
        self.attention_norm, self.mlp_norm = rms_norm(config), rms_norm(config)
        self.q_nope = Linear(dim, (heads, config.qk_nope_head_dim), **kw)
        self.q_rope = Linear(dim, (heads, config.qk_rope_head_dim), **kw)
        shape = (heads, config.qk_nope_head_dim)
        self.query_bias = nnx.Param(config.init(rngs.params(), shape, kw["param_dtype"]))
        self.out = Linear((heads, config.v_head_dim), dim, **kw)
        self.mlp = GatedMLP(dim, config.mlp_dim, **kw)

    def __call__(self, h, read, positions):
        x = self.attention_norm(h)
        q = self.q_nope(x)
        q = q + jax.lax.broadcast_to_rank(self.query_bias[...].astype(q.dtype), q.ndim)
        h = h + self.out(read(q, q_rope=rotary(self.q_rope(x), positions)))
        return h + self.mlp(self.mlp_norm(h))


class SlamV5(Transformer):
    """Level 1, level 2, level 3; all caches are latents, in level 2 one for each token."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        count, norm = config.level_layers, rms_norm(config)
        make = functools.partial(layer, config)
        below, above = (repeat(config.scan_layers, count, make, rngs=rngs) for _ in range(2))
        latents = Latents(config, rngs=rngs)
        blocks = ParallelBlocks(config, EFBlock, norm, latents, name="latents", rngs=rngs)
        super().__init__(config, [*below, blocks, *above], rngs=rngs)
