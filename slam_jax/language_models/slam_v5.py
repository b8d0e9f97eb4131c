"""SLAM v5, "Cutting-Edge": v4 with the parts that language models have today.

**This definition is ours.** No source was published; it is v4 with RMSNorm, rotary positions,
SwiGLU and multi-head latent attention in place of the multi-head one. What level 1 fixes for the
four EF blocks is then a latent a token, and the keys and values that are made of it are the same
for all four; each has its own queries, with a bias of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.errors import require, require_count
from slam_jax.language_models import flops
from slam_jax.language_models.base import LanguageModelConfig, Pass, Transformer
from slam_jax.layers.attention import Layout, causal_layout
from slam_jax.layers.latent_attention import LatentCache, MultiHeadLatentAttention, latent_attend
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import rotary

INIT = jax.nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV5Config(LanguageModelConfig):
    """mlp_dim: F. num_heads: N. kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of
    `MultiHeadLatentAttention`. level_layers: of level 1, and again of level 3. num_blocks: of level
    2, side by side."""

    mlp_dim: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    level_layers: int = 2
    num_blocks: int = 4

    def __post_init__(self):
        super().__post_init__()
        for field in ("mlp_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require_count(field, getattr(self, field))
        require_count("num_heads", self.num_heads, most=4_096)
        require_count("level_layers", self.level_layers, most=512)
        require_count("num_blocks", self.num_blocks, most=512)
        rope = self.qk_rope_head_dim
        require(rope > 0 and rope % 2 == 0, "qk_rope_head_dim", rope, "an even number above 0")

    def body_flops(self, num_tokens: int) -> int:
        mlp = flops.gated_mlp(num_tokens, self.embed_dim, self.mlp_dim)
        latents, queries = flops.latents(num_tokens, self), flops.latent_queries(num_tokens, self)
        layers = 2 * self.level_layers * (latents + queries + mlp)
        return layers + latents + self.num_blocks * (queries + mlp)


class Latents(nnx.Module):
    """Level 1 as the four blocks see it; for all the tokens that they may attend to."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        rank, heads = config.kv_lora_rank, config.num_heads
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
        made = self._latents(x, layout.positions)
        cache = cache.filled(*made, lengths)
        return self._bank(*made, layout.visible, absorbed=False), cache

    def decode_step(self, x, cache: LatentCache):
        positions = cache.length[..., None]
        cache = cache.extended(*self._latents(x, positions))
        visible = jnp.arange(cache.c_kv.shape[-2]) <= positions[..., None]
        return self._bank(cache.c_kv, cache.k_rope, visible, absorbed=True), cache

    def _latents(self, x, positions):
        k_rope = rotary(self.k_rope(x)[..., None, :], positions)[..., 0, :]
        return self.norm(self.down(x)), k_rope

    def _bank(self, c_kv, k_rope, visible, absorbed):
        """queries -> what they read."""
        k_up, v_up = (up.kernel[...].astype(self.dtype) for up in (self.k_up, self.v_up))

        def read(q, q_rope):
            return latent_attend(
                q, c_kv, k_up, v_up, q_rope=q_rope, k_rope=k_rope, mask=visible, absorbed=absorbed
            )

        return read


class Layer(nnx.Module):
    """Of levels 1 and 3: h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        norm: Any = dict(epsilon=config.norm_epsilon, param_dtype=kw["param_dtype"])
        self.attention_norm = RMSNorm(config.embed_dim, **norm)
        self.attention = MultiHeadLatentAttention(
            config.embed_dim,
            config.num_heads,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            **kw,
        )
        self.mlp_norm = RMSNorm(config.embed_dim, **norm)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, **kw)

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        a, cache = to.mix(self.attention, self.attention_norm(h), cache)
        h = h + a
        return h + self.mlp(self.mlp_norm(h)), cache, ()


class EFBlock(nnx.Module):
    """One of level 2: h += attention to level 1 with a query bias; h += mlp(norm(h))."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        norm: Any = dict(epsilon=config.norm_epsilon, param_dtype=kw["param_dtype"])
        dim, heads = config.embed_dim, config.num_heads
        self.attention_norm, self.mlp_norm = RMSNorm(dim, **norm), RMSNorm(dim, **norm)
        self.q_nope = Linear(dim, (heads, config.qk_nope_head_dim), **kw)
        self.q_rope = Linear(dim, (heads, config.qk_rope_head_dim), **kw)
        self.query_bias = nnx.Param(
            INIT(rngs.params(), (heads, config.qk_nope_head_dim), kw["param_dtype"])
        )
        self.out = Linear((heads, config.v_head_dim), dim, **kw)
        self.mlp = GatedMLP(dim, config.mlp_dim, **kw)

    def __call__(self, h, read, positions):
        x = self.attention_norm(h)
        q = self.q_nope(x)
        q = q + self.query_bias[...].astype(q.dtype)
        h = h + self.out(read(q, rotary(self.q_rope(x), positions)))
        return h + self.mlp(self.mlp_norm(h))


class EFLevel(nnx.Module):
    """Level 2: one latent a token, the blocks as one vmap over it, and their mean."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        param_dtype = config.dtypes["param_dtype"]
        norm: Any = dict(epsilon=config.norm_epsilon, param_dtype=param_dtype)
        self.norm = RMSNorm(config.embed_dim, **norm)
        self.latents = Latents(config, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_blocks)
        self.stack = jax.vmap(lambda key: EFBlock(config, rngs=nnx.Rngs(key)))(keys)

    def init_cache(self, batch_shape, max_length):
        return self.latents.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        read, cache = to.mix(self.latents, self.norm(h), cache)
        y = jax.vmap(lambda block: block(h, read, to.positions))(self.stack)
        return jnp.mean(y, axis=0), cache, ()


class SlamV5(Transformer):
    """Level 1, level 2, level 3, all of whose caches are latents."""

    def __init__(self, config: SlamV5Config, *, rngs: nnx.Rngs):
        below = [Layer(config, rngs=rngs) for _ in range(config.level_layers)]
        above = [Layer(config, rngs=rngs) for _ in range(config.level_layers)]
        blocks = [*below, EFLevel(config, rngs=rngs), *above]
        super().__init__(config, blocks, embedding_init=INIT, head_init=INIT, rngs=rngs)
