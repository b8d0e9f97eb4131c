"""SLAM v4 Champion, "Beast Combo": v4 with the parts that v6's source calls enhanced.

**This definition is ours.** No source was published. v6's public source calls three of its parts
"enhanced", so they were there before it: a gated MLP, attention whose output is gated, and a layer
whose attention and MLP run side by side. Here they replace v4's, and level 2 runs twice, through
the same four blocks: it is the slowest row of the published leaderboard. Else as v4: LayerNorm,
learned positions, averages.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.errors import require_count
from slam_jax.language_models import flops
from slam_jax.language_models.base import (
    LanguageModelConfig,
    Pass,
    Transformer,
    last_at_most,
)
from slam_jax.layers.cross_layer_attention import CrossLayerAttention, SharedKeyValues
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP

INIT = jax.nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV4ChampionConfig(LanguageModelConfig):
    """mlp_dim: F. num_heads: N. level_layers: of level 1, and again of level 3. num_blocks: of
    level 2, side by side. num_cycles: how often level 2 runs. context_length: also the number of
    learned positions."""

    mlp_dim: int
    num_heads: int
    level_layers: int = 2
    num_blocks: int = 4
    num_cycles: int = 2

    def __post_init__(self):
        super().__post_init__()
        require_count("mlp_dim", self.mlp_dim)
        for field in ("level_layers", "num_blocks", "num_cycles"):
            require_count(field, getattr(self, field), most=512)
        self.check_heads(self.num_heads, self.num_heads, None)

    def body_flops(self, num_tokens: int) -> int:
        dim = self.embed_dim
        rest = flops.linear(num_tokens, dim, 3 * dim)
        rest += flops.gated_mlp(num_tokens, dim, self.mlp_dim)
        layer = flops.attention(num_tokens, self) + rest
        block = flops.attention(num_tokens, self, own_keys=False) + rest
        keys = 2 * flops.linear(num_tokens, dim, dim)
        blocks = self.num_cycles * self.num_blocks * block
        return 2 * self.level_layers * layer + keys + blocks


def layer_norm(config: SlamV4ChampionConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.embed_dim, epsilon=config.norm_epsilon, **config.dtypes, rngs=rngs)


class SideBySide(nnx.Module):
    """norm(h + W [gate(x) * a; mlp(norm(h))]) where a is what attention made of x = norm(h): all of
    a layer but its attention, which levels 1 and 3 have in common with level 2."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        dim = config.embed_dim
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
    """Of levels 1 and 3."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        self.attention = GroupedQueryAttention(config.embed_dim, config.num_heads, **kw)
        self.rest = SideBySide(config, rngs=rngs)

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        x = self.rest.attention_norm(h)
        a, cache = to.mix(self.attention, x, cache)
        return self.rest(h, x, a), cache, ()


class EFBlock(nnx.Module):
    """One of level 2."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        head_dim = config.embed_dim // config.num_heads
        self.attention = CrossLayerAttention(
            config.embed_dim, config.num_heads, head_dim, query_bias=True, **kw
        )
        self.rest = SideBySide(config, rngs=rngs)

    def __call__(self, h, shared, positions):
        x = self.rest.attention_norm(h)
        return self.rest(h, x, self.attention(x, shared, positions))


class EFLevel(nnx.Module):
    """Level 2: one set of keys and values, and so many times the blocks over it and their mean."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        dim, head_dim = config.embed_dim, config.embed_dim // config.num_heads
        self.num_cycles = config.num_cycles
        self.norm = layer_norm(config, rngs)
        self.key_values = SharedKeyValues(dim, config.num_heads, head_dim, **kw)
        keys = jax.random.split(rngs.params(), config.num_blocks)
        self.stack = jax.vmap(lambda key: EFBlock(config, rngs=nnx.Rngs(key)))(keys)

    def init_cache(self, batch_shape, max_length):
        return self.key_values.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        shared, cache = to.mix(self.key_values, self.norm(h), cache)
        run = jax.vmap(lambda block, h: block(h, shared, to.positions), in_axes=(0, None))
        for _ in range(self.num_cycles):
            h = jnp.mean(run(self.stack, h), axis=0)
        return h, cache, ()


class SlamV4Champion(Transformer):
    """Level 1, level 2 twice, level 3."""

    def __init__(self, config: SlamV4ChampionConfig, *, rngs: nnx.Rngs):
        below = [Layer(config, rngs=rngs) for _ in range(config.level_layers)]
        above = [Layer(config, rngs=rngs) for _ in range(config.level_layers)]
        super().__init__(
            config,
            [*below, EFLevel(config, rngs=rngs), *above],
            norm=layer_norm(config, rngs),
            embedding_init=INIT,
            head_init=INIT,
            rngs=rngs,
        )
        self.positions = nnx.Embed(
            config.context_length, config.embed_dim, embedding_init=INIT, **config.dtypes, rngs=rngs
        )

    def embed(self, tokens, positions, key):
        # Pads may stand beyond the last position, and what they hold is no matter; but not NaN.
        return self.embedding(tokens) + self.positions(last_at_most(positions, self.config))
