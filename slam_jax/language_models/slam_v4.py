"""SLAM v4, "Improved": the three levels of SLAM v3's text encoder as a language model.

**This definition is ours.** Of v4 only its name and its row in the published leaderboard are
public. It is v3's public text encoder with causal attention: 2 layers; four EF (encoder fusion)
blocks that all read the keys and values of level 1, each with its own query bias, averaged; 2
layers. LayerNorm, GELU, learned positions, no experts.
"""

import dataclasses
import functools

from flax import nnx

from slam_jax.language_models.base import (
    ParallelBlocks,
    PreNormBlock,
    Transformer,
    layer_norm,
)
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.cross_layer_attention import CrossLayerAttention, SharedKeyValues
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.mlp import MLP
from slam_jax.layers.stacked import repeat


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV4Config(LanguageModelConfig):
    """level_layers: layers of level 1, and as many of level 3. num_blocks: parallel blocks of
    level 2. context_length: also the number of learned positions."""

    mlp_dim: int
    num_heads: int
    level_layers: int = 2
    num_blocks: int = 4

    def body_flops(self, num_tokens: int) -> int:
        dim, heads = self.embed_dim, self.num_heads
        rest = 2 * flops.linear(num_tokens, dim, self.mlp_dim)
        layer = flops.attention(num_tokens, dim, heads) + rest
        block = flops.attention(num_tokens, dim, heads, own_keys=False) + rest
        keys = 2 * flops.linear(num_tokens, dim, dim)
        return 2 * self.level_layers * layer + keys + self.num_blocks * block


def layer(config: SlamV4Config, *, rngs: nnx.Rngs) -> PreNormBlock:
    """A layer of level 1 or 3."""
    dim, kw = config.embed_dim, config.options(rngs)
    return PreNormBlock(
        config,
        norms=[layer_norm(config, rngs), layer_norm(config, rngs)],
        attention=GroupedQueryAttention(dim, config.num_heads, **kw),
        mlp=MLP(dim, config.mlp_dim, **kw),
    )


class EFBlock(nnx.Module):
    """A block of level 2: h += attention to level 1 with a query bias; h += mlp(norm(h))."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
        dim, kw = config.embed_dim, config.options(rngs)
        head_dim = dim // config.num_heads
        self.attention_norm, self.mlp_norm = layer_norm(config, rngs), layer_norm(config, rngs)
        self.attention = CrossLayerAttention(dim, config.num_heads, head_dim, query_bias=True, **kw)
        self.mlp = MLP(dim, config.mlp_dim, **kw)

    def __call__(self, h, shared, positions):
        h = h + self.attention(self.attention_norm(h), shared, positions)
        return h + self.mlp(self.mlp_norm(h))


class SlamV4(Transformer):
    """Level 1, level 2, level 3; the four blocks of level 2 need no cache of their own."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
        dim, heads, count = config.embed_dim, config.num_heads, config.level_layers
        make = functools.partial(layer, config)
        below, above = (repeat(config.scan_layers, count, make, rngs=rngs) for _ in range(2))
        norm, sizes = layer_norm(config, rngs), (dim, heads, dim // heads)
        key_values = SharedKeyValues(*sizes, **config.options(rngs))
        blocks = ParallelBlocks(config, EFBlock, norm, key_values, rngs=rngs)
        levels = [*below, blocks, *above]
        norm = layer_norm(config, rngs)
        super().__init__(config, levels, norm=norm, learned_positions=True, rngs=rngs)
