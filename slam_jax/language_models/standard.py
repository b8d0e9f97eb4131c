"""The standard transformer: RMSNorm, rotary positions, grouped queries, SwiGLU.

Sources: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971), section 2.2; grouped queries as in
Llama 2 (arXiv 2307.09288), section 2.2.
"""

import dataclasses

from flax import nnx

from slam_jax.language_models.base import PreNormBlock, Transformer
from slam_jax.language_models.config import HEADS, TransformerConfig
from slam_jax.layers import flops
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.stacked import repeat


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardConfig(TransformerConfig):
    """See `LanguageModelConfig`."""

    def body_flops(self, num_tokens: int) -> int:
        attention = flops.attention(num_tokens, self.embed_dim, **self.sizes(*HEADS))
        mlp = flops.gated_mlp(num_tokens, self.embed_dim, self.mlp_dim)
        return self.num_layers * (attention + mlp)


class Standard(Transformer):
    """A decoder-only transformer as most are built today."""

    def __init__(self, config: StandardConfig, *, rngs: nnx.Rngs):
        dim, heads = config.embed_dim, config.sizes(*HEADS, "rope")

        def block(*, rngs: nnx.Rngs) -> PreNormBlock:
            kw = config.options(rngs)
            return PreNormBlock(
                config,
                attention=GroupedQueryAttention(dim, **heads, **kw),
                mlp=GatedMLP(dim, config.mlp_dim, **kw),
            )

        blocks = repeat(config.scan_layers, config.num_layers, block, rngs=rngs)
        super().__init__(config, blocks, rngs=rngs)
