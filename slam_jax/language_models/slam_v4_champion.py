"""SLAM v4 Champion, "Beast Combo": v4 with the parts that v6's source calls enhanced.

**This definition is ours.** No source was published. v6's public source calls three of its parts
"enhanced", so an earlier version had them: a gated MLP, attention with a gated output, and a layer
whose attention and MLP run in parallel. Here they replace those of v4, and level 2 runs twice,
through the same four blocks: this is the slowest row of the published leaderboard. Otherwise as v4:
LayerNorm, learned positions, averages.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.language_models.base import (
    ForwardPass,
    ParallelBlocks,
    Transformer,
    layer_norm,
)
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.cross_layer_attention import CrossLayerAttention, SharedKeyValues
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.stacked import repeat


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV4ChampionConfig(LanguageModelConfig):
    """level_layers: layers of level 1, and as many of level 3. num_blocks: parallel blocks of
    level 2. num_cycles: how often level 2 runs. context_length: also the number of learned
    positions."""

    mlp_dim: int
    num_heads: int
    level_layers: int = 2
    num_blocks: int = 4
    num_cycles: int = 2

    def body_flops(self, num_tokens: int) -> int:
        dim, heads = self.embed_dim, self.num_heads
        rest = flops.linear(num_tokens, dim, 3 * dim)
        rest += flops.gated_mlp(num_tokens, dim, self.mlp_dim)
        layer = flops.attention(num_tokens, dim, heads) + rest
        block = flops.attention(num_tokens, dim, heads, own_keys=False) + rest
        keys = 2 * flops.linear(num_tokens, dim, dim)
        blocks = self.num_cycles * self.num_blocks * block
        return 2 * self.level_layers * layer + keys + blocks


class GatedParallel(nnx.Module):
    """norm(h + W [gate(x) * a; mlp(norm(h))]), where a is the attention's output for x = norm(h).

    It is a layer without its attention, which differs between level 2 and levels 1 and 3.
    """

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        dim, kw = config.embed_dim, config.options(rngs)
        self.attention_norm, self.mlp_norm = layer_norm(config, rngs), layer_norm(config, rngs)
        self.norm = layer_norm(config, rngs)
        self.gate = Linear(dim, dim, **kw)
        self.mlp = GatedMLP(dim, config.mlp_dim, activation=jax.nn.gelu, **kw)
        self.out = Linear((2, dim), dim, **kw)

    def __call__(self, h, x, a):
        a = jax.nn.sigmoid(self.gate(x)) * a
        y = self.out(jnp.stack([a, self.mlp(self.mlp_norm(h))], axis=-2))
        return self.norm(h + y)


class Layer(nnx.Module):
    """A layer of level 1 or 3."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        sizes = (config.embed_dim, config.num_heads)
        self.attention = GroupedQueryAttention(*sizes, **config.options(rngs))
        self.rest = GatedParallel(config, rngs=rngs)

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        x = self.rest.attention_norm(h)
        a, cache = forward.mix(self.attention, x, cache)
        return self.rest(h, x, a), cache, ()


class EFBlock(nnx.Module):
    """A block of level 2."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        sizes = (config.embed_dim, config.num_heads, config.embed_dim // config.num_heads)
        self.attention = CrossLayerAttention(*sizes, query_bias=True, **config.options(rngs))
        self.rest = GatedParallel(config, rngs=rngs)

    def __call__(self, h, shared, positions):
        x = self.rest.attention_norm(h)
        return self.rest(h, x, self.attention(x, shared, positions))


class SlamV4Champion(Transformer):
    """Level 1, level 2 twice, level 3."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        dim, heads, count = config.embed_dim, config.num_heads, config.level_layers
        make = functools.partial(Layer, config)
        below, above = (repeat(config.scan_layers, count, make, rngs=rngs) for _ in range(2))
        norm, sizes = layer_norm(config, rngs), (dim, heads, dim // heads)
        key_values = SharedKeyValues(*sizes, **config.options(rngs))
        cycles = config.num_cycles
        blocks = ParallelBlocks(config, EFBlock, norm, key_values, num_cycles=cycles, rngs=rngs)
        levels = [*below, blocks, *above]
        norm = layer_norm(config, rngs)
        super().__init__(config, levels, norm=norm, learned_positions=True, rngs=rngs)
