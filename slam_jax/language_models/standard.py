"""The standard transformer: RMSNorm, rotary positions, grouped queries, SwiGLU.

Sources: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971), section 2.2; grouped queries as in
Llama 2 (arXiv 2307.09288), section 2.2.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from slam_jax.errors import require_count
from slam_jax.language_models import flops
from slam_jax.language_models.base import LanguageModelConfig, Pass, Transformer
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardConfig(LanguageModelConfig):
    """mlp_dim: F. num_layers. num_heads: N, num_kv_heads: K, None = N. head_dim: None = D / N.
    rope: the positions. init_std: of all maps and the embeddings."""

    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope: Rope = Rope()
    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        require_count("mlp_dim", self.mlp_dim)
        require_count("num_layers", self.num_layers, most=512)
        self.check_heads(
            self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim, turned=True
        )

    def body_flops(self, num_tokens: int) -> int:
        mlp = flops.gated_mlp(num_tokens, self.embed_dim, self.mlp_dim)
        return self.num_layers * (flops.attention(num_tokens, self) + mlp)


class Block(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: StandardConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        kw: Any = dict(**config.dtypes, kernel_init=init, rngs=rngs)
        norm: Any = dict(epsilon=config.norm_epsilon, param_dtype=kw["param_dtype"])
        self.attention_norm = RMSNorm(config.embed_dim, **norm)
        self.attention = GroupedQueryAttention(
            config.embed_dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope=config.rope,
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


class Standard(Transformer):
    """A decoder-only transformer as most are built today."""

    def __init__(self, config: StandardConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        blocks = [Block(config, rngs=rngs) for _ in range(config.num_layers)]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)
