"""The standard transformer: RMSNorm, rotary positions, grouped queries, SwiGLU.

Sources: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971), section 2.2; grouped queries as in
Llama 2 (arXiv 2307.09288), section 2.2.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from slam_jax.language_models.base import PreNormBlock, Transformer, rms_norm
from slam_jax.language_models.config import HEADS, LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.mlp import GatedMLP
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
        self.check_heads()

    def body_flops(self, num_tokens: int) -> int:
        attention = flops.attention(num_tokens, self.embed_dim, **self.sizes(*HEADS))
        mlp = flops.gated_mlp(num_tokens, self.embed_dim, self.mlp_dim)
        return self.num_layers * (attention + mlp)


class Standard(Transformer):
    """A decoder-only transformer as most are built today."""

    def __init__(self, config: StandardConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        kw: Any = dict(**config.dtypes, kernel_init=init, rngs=rngs)
        heads = config.sizes(*HEADS, "rope")
        blocks = [
            PreNormBlock(
                attention_norm=rms_norm(config),
                mlp_norm=rms_norm(config),
                attention=GroupedQueryAttention(config.embed_dim, **heads, **kw),
                mlp=GatedMLP(config.embed_dim, config.mlp_dim, **kw),
            )
            for _ in range(config.num_layers)
        ]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)
