"""SLAM v6, "Jamba killer": four different encoder-fusion blocks between layers whose attention and
MLP run in parallel.

Source: the author's public SLAM v6, with the same sizes; at the published size it has 70,292,992
parameters. No biases. Linear maps start as He et al. 2015 (normal, std sqrt(2 / fan_in)),
embeddings with std 0.01.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.errors import require
from slam_jax.language_models.base import (
    ForwardPass,
    Transformer,
    learned_positions,
    rms_norm,
    within_context,
)
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP

HE_NORMAL = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
EMBEDDING_INIT = jax.nn.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV6Config(LanguageModelConfig):
    """mlp_dim: F. num_heads: N, even. level_layers: layers of level 1, and as many of level 3.
    dropout: rate for the embeddings and for what a layer adds to them.
    context_length: also the number of learned positions."""

    mlp_dim: int
    num_heads: int
    level_layers: int = 2
    dropout: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        self.check_heads()
        heads, mlp_dim = self.num_heads, self.mlp_dim
        require(heads % 2 == 0, "num_heads", heads, "an even number: one block has half of them")
        require(mlp_dim % 2 == 0, "mlp_dim", mlp_dim, "an even number: one block has half of it")

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


def linear(config: SlamV6Config, inputs, outputs, rngs: nnx.Rngs) -> Linear:
    return Linear(inputs, outputs, kernel_init=HE_NORMAL, **config.dtypes, rngs=rngs)


def glu(config: SlamV6Config, mlp_dim: int, rngs: nnx.Rngs) -> GatedMLP:
    kw: Any = dict(**config.dtypes, rngs=rngs)
    return GatedMLP(config.embed_dim, mlp_dim, kernel_init=HE_NORMAL, **kw)


class ParallelLayer(nnx.Module):
    """a = attention(x) * sigmoid(W x) of x = norm(h), f = GLU(norm(h)), then norm(h + W [a; f])."""

    def __init__(self, config: SlamV6Config, num_heads: int, mlp_dim: int, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        kw: Any = dict(**config.dtypes, rngs=rngs)
        self.dropout = config.dropout
        self.attention_norm, self.mlp_norm = rms_norm(config), rms_norm(config)
        self.norm = rms_norm(config)
        self.attention = GroupedQueryAttention(dim, num_heads, kernel_init=HE_NORMAL, **kw)
        self.gate = linear(config, dim, dim, rngs)
        self.mlp = glu(config, mlp_dim, rngs)
        self.out = linear(config, (2, dim), dim, rngs)

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        x = self.attention_norm(h)
        a, cache = forward.mix(self.attention, x, cache)
        a = a * jax.nn.sigmoid(self.gate(x))
        y = self.out(jnp.stack([a, self.mlp(self.mlp_norm(h))], axis=-2))
        return self.norm(h + dropout(y, self.dropout, key)), cache, ()


class Sequence(nnx.Module):
    """W2 silu(W1 norm(m))."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.norm = rms_norm(config)
        self.up, self.down = linear(config, dim, dim, rngs), linear(config, dim, dim, rngs)

    def __call__(self, m):
        return self.down(jax.nn.silu(self.up(self.norm(m))))


class Pattern(nnx.Module):
    """GLU(norm(m))."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        self.norm, self.mlp = rms_norm(config), glu(config, config.mlp_dim, rngs)

    def __call__(self, m):
        return self.mlp(self.norm(m))


class EFBlock(nnx.Module):
    """m = layer(x + 0.01 (W_q x + W_k x + W_v x) / 3); norm(m + specialist(m))."""

    def __init__(self, config: SlamV6Config, specialist: nnx.Module, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.q, self.k, self.v = (linear(config, dim, dim, rngs) for _ in range(3))
        self.layer = ParallelLayer(config, config.num_heads, config.mlp_dim, rngs=rngs)
        self.specialist: Any = specialist
        self.norm = rms_norm(config)

    def init_cache(self, batch_shape, max_length):
        cache = self.layer.init_cache(batch_shape, max_length)
        attends = isinstance(self.specialist, ParallelLayer)
        return cache, self.specialist.init_cache(batch_shape, max_length) if attends else ()

    def __call__(self, x, forward: ForwardPass, caches, key):
        keys, caches = split(key, 2), caches or (None, None)
        x = x + 0.01 * (self.q(x) + self.k(x) + self.v(x)) / 3
        m, cache, _ = self.layer(x, forward, caches[0], keys[0])
        if isinstance(self.specialist, ParallelLayer):
            s, specialist_cache, _ = self.specialist(m, forward, caches[1], keys[1])
        else:
            s, specialist_cache = self.specialist(m), ()
        return self.norm(m + s), (cache, specialist_cache), ()


class EFLevel(nnx.Module):
    """Level 2: four blocks on the output x of level 1, y = sum g_i block_i(x) with
    g = softmax(W norm(x)), and x + GLU(y)."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        dim, heads, mlp_dim = config.embed_dim, config.num_heads, config.mlp_dim
        specialists = {
            "attention": ParallelLayer(config, heads, mlp_dim // 2, rngs=rngs),
            "ffn": ParallelLayer(config, heads // 2, 2 * mlp_dim, rngs=rngs),
            "sequence": Sequence(config, rngs=rngs),
            "pattern": Pattern(config, rngs=rngs),
        }
        self.blocks = nnx.List([EFBlock(config, s, rngs=rngs) for s in specialists.values()])
        self.norm = rms_norm(config)
        self.weights = linear(config, dim, len(specialists), rngs)
        self.mlp = glu(config, dim, rngs)

    def init_cache(self, batch_shape, max_length):
        return tuple(block.init_cache(batch_shape, max_length) for block in self.blocks)

    def __call__(self, x, forward: ForwardPass, caches, key):
        caches, outputs, new_caches = caches or (None,) * len(self.blocks), [], []
        keys = split(key, len(self.blocks))
        for block, cache, block_key in zip(self.blocks, caches, keys, strict=True):
            y, cache, _ = block(x, forward, cache, block_key)
            outputs.append(y)
            new_caches.append(cache)
        weights = jax.nn.softmax(self.weights(self.norm(x)), axis=-1)
        y = jnp.sum(jnp.stack(outputs, axis=-2) * weights[..., None], axis=-2)
        return x + self.mlp(y), tuple(new_caches), ()


class SlamV6(Transformer):
    """Level 1, level 2, level 3; every attention is causal."""

    def __init__(self, config: SlamV6Config, *, rngs: nnx.Rngs):
        def layers():
            sizes = (config.num_heads, config.mlp_dim)
            return [ParallelLayer(config, *sizes, rngs=rngs) for _ in range(config.level_layers)]

        blocks = [*layers(), EFLevel(config, rngs=rngs), *layers()]
        inits: Any = dict(embedding_init=EMBEDDING_INIT, head_init=HE_NORMAL)
        super().__init__(config, blocks, **inits, rngs=rngs)
        self.positions = learned_positions(config, EMBEDDING_INIT, rngs)
        self.input_norm = rms_norm(config)

    def embed(self, tokens, positions, key):
        place = self.positions(within_context(positions, self.config))
        h = self.input_norm(self.embedding(tokens) + 0.02 * place)
        return dropout(h, self.config.dropout, key)
