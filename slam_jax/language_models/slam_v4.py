"""SLAM v4, "Improved": the three levels of SLAM v3's text encoder as a language model.

**This definition is ours.** No source of v4 was published; its name and its row in the published
leaderboard are all there is. It is what v3's public text encoder becomes when every attention looks
back only: 2 layers; four EF (encoder fusion) blocks that all read the keys and values fixed by
level 1, each with a query bias of its own, their outputs averaged; 2 layers. LayerNorm, GELU,
learned positions, no experts.
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
from slam_jax.layers.mlp import MLP

INIT = jax.nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV4Config(LanguageModelConfig):
    """mlp_dim: F. num_heads: N. level_layers: of level 1, and again of level 3. num_blocks: of
    level 2, side by side. context_length: also the number of learned positions."""

    mlp_dim: int
    num_heads: int
    level_layers: int = 2
    num_blocks: int = 4

    def __post_init__(self):
        super().__post_init__()
        require_count("mlp_dim", self.mlp_dim)
        require_count("level_layers", self.level_layers, most=512)
        require_count("num_blocks", self.num_blocks, most=512)
        self.check_heads(self.num_heads, self.num_heads, None)

    def body_flops(self, num_tokens: int) -> int:
        dim = self.embed_dim
        mlp = 2 * flops.linear(num_tokens, dim, self.mlp_dim)
        layer = flops.attention(num_tokens, self) + mlp
        block = flops.attention(num_tokens, self, own_keys=False) + mlp
        keys = 2 * flops.linear(num_tokens, dim, dim)
        return 2 * self.level_layers * layer + keys + self.num_blocks * block


def layer_norm(config: SlamV4Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.embed_dim, epsilon=config.norm_epsilon, **config.dtypes, rngs=rngs)


class Layer(nnx.Module):
    """Of levels 1 and 3: h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        self.attention_norm, self.mlp_norm = layer_norm(config, rngs), layer_norm(config, rngs)
        self.attention = GroupedQueryAttention(config.embed_dim, config.num_heads, **kw)
        self.mlp = MLP(config.embed_dim, config.mlp_dim, **kw)

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        a, cache = to.mix(self.attention, self.attention_norm(h), cache)
        h = h + a
        return h + self.mlp(self.mlp_norm(h)), cache, ()


class EFBlock(nnx.Module):
    """One of level 2: h += attention to level 1 with a query bias; h += mlp(norm(h))."""

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
    """Level 2: one set of keys and values, the blocks as one vmap over it, and their mean."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, kernel_init=INIT, rngs=rngs)
        dim, head_dim = config.embed_dim, config.embed_dim // config.num_heads
        self.norm = layer_norm(config, rngs)
        self.key_values = SharedKeyValues(dim, config.num_heads, head_dim, **kw)
        keys = jax.random.split(rngs.params(), config.num_blocks)
        self.stack = jax.vmap(lambda key: EFBlock(config, rngs=nnx.Rngs(key)))(keys)

    def init_cache(self, batch_shape, max_length):
        return self.key_values.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        shared, cache = to.mix(self.key_values, self.norm(h), cache)
        y = jax.vmap(lambda block: block(h, shared, to.positions))(self.stack)
        return jnp.mean(y, axis=0), cache, ()


class SlamV4(Transformer):
    """Level 1, level 2, level 3, with caches for all but the four blocks, which need none."""

    def __init__(self, config: SlamV4Config, *, rngs: nnx.Rngs):
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
