"""SLAM v4, "Improved": the three levels of SLAM v3's text encoder as a language model.

**This definition is ours.** Of v4 only its name and its row in the published leaderboard are
public. It is v3's public text encoder with causal attention: 2 layers; four EF (encoder fusion)
blocks that all read the keys and values of level 1, each with its own query bias, averaged; 2
layers. LayerNorm, GELU, learned positions, no experts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.language_models.base import (
    ForwardPass,
    PreNormBlock,
    Transformer,
    layer_norm,
    learned_positions,
    within_context,
)
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.cross_layer_attention import CrossLayerAttention, SharedKeyValues
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.mlp import MLP

INIT = jax.nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV4Config(LanguageModelConfig):
    """mlp_dim: F. num_heads: N. level_layers: layers of level 1, and as many of level 3.
    num_blocks: parallel blocks of level 2. context_length: also the number of learned positions."""

    mlp_dim: int
    num_heads: int
    level_layers: int = 2
    num_blocks: int = 4

    def __post_init__(self):
        super().__post_init__()
        self.check_heads()

    def body_flops(self, num_tokens: int) -> int:
        dim, heads = self.embed_dim, self.num_heads
        rest = 2 * flops.linear(num_tokens, dim, self.mlp_dim)
        layer = flops.attention(num_tokens, dim, heads) + rest
        block = flops.attention(num_tokens, dim, heads, own_keys=False) + rest
        keys = 2 * flops.linear(num_tokens, dim, dim)
        return 2 * self.level_layers * layer + keys + self.num_blocks * block


def layer(config: SlamV4Config, *, rngs: nnx.Rngs) -> PreNormBlock:
    """A layer of level 1 or 3."""
    kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
    return PreNormBlock(
        attention_norm=layer_norm(config, rngs),
        mlp_norm=layer_norm(config, rngs),
        attention=GroupedQueryAttention(config.embed_dim, config.num_heads, **kw),
        mlp=MLP(config.embed_dim, config.mlp_dim, **kw),
    )


class EFBlock(nnx.Module):
    """A block of level 2: h += attention to level 1 with a query bias; h += mlp(norm(h))."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        head_dim = config.embed_dim // config.num_heads
        self.attention_norm, self.mlp_norm = layer_norm(config, rngs), layer_norm(config, rngs)
        self.attention = CrossLayerAttention(
            config.embed_dim, config.num_heads, head_dim, query_bias=True, **kw
        )
        self.mlp = MLP(config.embed_dim, config.mlp_dim, **kw)

    def __call__(self, h, shared, positions):
        h = h + self.attention(self.attention_norm(h), shared, positions)
        return h + self.mlp(self.mlp_norm(h))


class EFLevel(nnx.Module):
    """Level 2: one set of keys and values, read by all blocks in one vmap, and their mean."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        dim, head_dim = config.embed_dim, config.embed_dim // config.num_heads
        self.norm = layer_norm(config, rngs)
        self.key_values = SharedKeyValues(dim, config.num_heads, head_dim, **kw)
        keys = jax.random.split(rngs.params(), config.num_blocks)
        self.stack = jax.vmap(lambda key: EFBlock(config, rngs=nnx.Rngs(key)))(keys)

    def init_cache(self, batch_shape, max_length):
        return self.key_values.init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        shared, cache = forward.mix(self.key_values, self.norm(h), cache)
        y = jax.vmap(lambda block: block(h, shared, forward.positions))(self.stack)
        return jnp.mean(y, axis=0), cache, ()


class SlamV4(Transformer):
    """Level 1, level 2, level 3; the four blocks of level 2 need no cache of their own."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
        below = [layer(config, rngs=rngs) for _ in range(config.level_layers)]
        above = [layer(config, rngs=rngs) for _ in range(config.level_layers)]
        blocks = [*below, EFLevel(config, rngs=rngs), *above]
        inits: Any = dict(embedding_init=INIT, head_init=INIT)
        super().__init__(config, blocks, norm=layer_norm(config, rngs), **inits, rngs=rngs)
        self.positions = learned_positions(config, INIT, rngs)

    def embed(self, tokens, positions, key):
        return self.embedding(tokens) + self.positions(within_context(positions, self.config))
