"""SLAM v6, "Jamba killer": four different encoder-fusion blocks between layers whose attention and
MLP run in parallel.

Source: the author's public SLAM v6, with the same sizes; at the published size it has 70,292,992
parameters. No biases. Linear maps start as He et al. 2015 (normal, std sqrt(2 / fan_in)),
embeddings with std 0.01.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.errors import require
from slam_jax.language_models.base import ForwardPass, Transformer, rms_norm
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.linear import Initializer, Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.stacked import repeat


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV6Config(LanguageModelConfig):
    """level_layers: layers of level 1, and as many of level 3. dropout: rate for the embeddings and
    for what a layer adds to them. context_length: also the number of learned positions."""

    mlp_dim: int
    num_heads: int
    level_layers: int = 2
    dropout: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        heads, mlp_dim = self.num_heads, self.mlp_dim
        require(heads % 2 == 0, "num_heads", heads, "an even number: one block has half of them")
        require(mlp_dim % 2 == 0, "mlp_dim", mlp_dim, "an even number: one block has half of it")

    @property
    def init(self) -> Initializer:
        return jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")

    def body_flops(self, num_tokens: int) -> int:
        dim, mlp_dim = self.embed_dim, self.mlp_dim

        def layer(mlp_dim: int) -> int:
            """Attention, its gate, the GLU, and the map of both to one."""
            maps = flops.linear(num_tokens, dim, 3 * dim)
            glu = flops.gated_mlp(num_tokens, dim, mlp_dim)
            return flops.attention(num_tokens, dim, self.num_heads) + maps + glu

        specialists = layer(mlp_dim // 2) + layer(2 * mlp_dim)
        specialists += flops.linear(num_tokens, dim, 2 * dim)
        specialists += flops.gated_mlp(num_tokens, dim, mlp_dim)
        blocks = 4 * (flops.linear(num_tokens, dim, 3 * dim) + layer(mlp_dim)) + specialists
        fusion = flops.linear(num_tokens, dim, 4) + flops.gated_mlp(num_tokens, dim, dim)
        return 2 * self.level_layers * layer(mlp_dim) + blocks + fusion


class ParallelLayer(nnx.Module):
    """a = attention(x) * sigmoid(W x) of x = norm(h), f = GLU(norm(h)), then norm(h + W [a; f])."""

    def __init__(self, config: SlamV6Config, num_heads: int, mlp_dim: int, *, rngs: nnx.Rngs):
        dim, kw = config.embed_dim, config.options(rngs)
        self.dropout = config.dropout
        self.attention_norm, self.mlp_norm = rms_norm(config), rms_norm(config)
        self.norm = rms_norm(config)
        self.attention = GroupedQueryAttention(dim, num_heads, **kw)
        self.gate = Linear(dim, dim, **kw)
        self.mlp = GatedMLP(dim, mlp_dim, **kw)
        self.out = Linear((2, dim), dim, **kw)

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        x = self.attention_norm(h)
        a, cache = forward.mix(self.attention, x, cache)
        a = a * jax.nn.sigmoid(self.gate(x))
        y = self.out(jnp.stack([a, self.mlp(self.mlp_norm(h))], axis=-2))
        return self.norm(h + dropout(y, self.dropout, key)), cache, ()


class Pointwise(nnx.Module):
    """A specialist without attention, and therefore without a cache."""

    def init_cache(self, batch_shape, max_length):
        return ()


class Sequence(Pointwise):
    """W2 silu(W1 norm(m))."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        dim, kw = config.embed_dim, config.options(rngs)
        self.norm = rms_norm(config)
        self.up, self.down = Linear(dim, dim, **kw), Linear(dim, dim, **kw)

    def __call__(self, m, forward: ForwardPass, cache, key):
        return self.down(jax.nn.silu(self.up(self.norm(m)))), (), ()


class Pattern(Pointwise):
    """GLU(norm(m))."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        self.norm = rms_norm(config)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, **config.options(rngs))

    def __call__(self, m, forward: ForwardPass, cache, key):
        return self.mlp(self.norm(m)), (), ()


class EFBlock(nnx.Module):
    """m = layer(x + 0.01 (W_q x + W_k x + W_v x) / 3); norm(m + specialist(m))."""

    def __init__(self, config: SlamV6Config, specialist: nnx.Module, *, rngs: nnx.Rngs):
        dim, kw = config.embed_dim, config.options(rngs)
        self.q, self.k, self.v = (Linear(dim, dim, **kw) for _ in range(3))
        self.layer = ParallelLayer(config, config.num_heads, config.mlp_dim, rngs=rngs)
        self.specialist: Any = specialist
        self.norm = rms_norm(config)

    def init_cache(self, batch_shape, max_length):
        return tuple(m.init_cache(batch_shape, max_length) for m in (self.layer, self.specialist))

    def __call__(self, x, forward: ForwardPass, caches, key):
        keys, caches = split(key, 2), caches or (None, None)
        x = x + 0.01 * (self.q(x) + self.k(x) + self.v(x)) / 3
        m, cache, _ = self.layer(x, forward, caches[0], keys[0])
        s, specialist_cache, _ = self.specialist(m, forward, caches[1], keys[1])
        return self.norm(m + s), (cache, specialist_cache), ()


class EFLevel(nnx.Module):
    """Level 2: four blocks on the output x of level 1, y = sum g_i block_i(x) with
    g = softmax(W norm(x)), and x + GLU(y)."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        dim, heads, mlp_dim = config.embed_dim, config.num_heads, config.mlp_dim
        specialists = [
            ParallelLayer(config, heads, mlp_dim // 2, rngs=rngs),
            ParallelLayer(config, heads // 2, 2 * mlp_dim, rngs=rngs),
            Sequence(config, rngs=rngs),
            Pattern(config, rngs=rngs),
        ]
        self.blocks = nnx.List([EFBlock(config, s, rngs=rngs) for s in specialists])
        self.norm, kw = rms_norm(config), config.options(rngs)
        self.weights = Linear(dim, len(specialists), **kw)
        self.mlp = GatedMLP(dim, dim, **kw)

    def init_cache(self, batch_shape, max_length):
        return tuple(block.init_cache(batch_shape, max_length) for block in self.blocks)

    def __call__(self, x, forward: ForwardPass, caches, key):
        count = len(self.blocks)
        each = zip(self.blocks, caches or (None,) * count, split(key, count), strict=True)
        outputs = [block(x, forward, cache, block_key) for block, cache, block_key in each]
        weights = jax.nn.softmax(self.weights(self.norm(x)), axis=-1)
        y = jnp.sum(jnp.stack([y for y, _, _ in outputs], axis=-2) * weights[..., None], axis=-2)
        return x + self.mlp(y), tuple(cache for _, cache, _ in outputs), ()


class SlamV6(Transformer):
    """Level 1, level 2, level 3; every attention is causal."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        make = functools.partial(ParallelLayer, config, config.num_heads, config.mlp_dim)

        def layers() -> list[Any]:
            return repeat(config.scan_layers, config.level_layers, make, rngs=rngs)

        init = jax.nn.initializers.normal(0.01)
        blocks = [*layers(), EFLevel(config, rngs=rngs), *layers()]
        super().__init__(config, blocks, embedding_init=init, learned_positions=True, rngs=rngs)
        self.input_norm = rms_norm(config)

    def embed(self, tokens, positions, key):
        h = self.input_norm(self.embedding(tokens) + 0.02 * self.learned(positions))
        return dropout(h, self.config.dropout, key)
