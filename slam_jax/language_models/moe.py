"""Mixture of experts: the standard transformer with several MLPs a layer, two of them a token.

Source: Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088), section 2.
"""

import dataclasses

from flax import nnx

from slam_jax.language_models.base import PreNormBlock, Transformer
from slam_jax.language_models.config import EXPERTS, HEADS, TransformerConfig
from slam_jax.layers import flops
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.stacked import repeat


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(TransformerConfig):
    """mlp_dim: F of one expert. The others: see `LanguageModelConfig`."""

    num_experts: int = 8
    num_experts_per_token: int = 2
    balance_loss: float = 0.02

    def body_flops(self, num_tokens: int) -> int:
        attention = flops.attention(num_tokens, self.embed_dim, **self.sizes(*HEADS))
        mlp = flops.mixture_of_experts(num_tokens, self.embed_dim, **self.sizes(*EXPERTS))
        return self.num_layers * (attention + mlp)


class MoE(Transformer):
    """A mixture of experts in every layer; the weights of a token's experts sum to 1."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        heads, experts = config.sizes(*HEADS, "rope"), config.sizes(*EXPERTS)

        def block(*, rngs: nnx.Rngs) -> PreNormBlock:
            kw = config.options(rngs)
            return PreNormBlock(
                config,
                attention=GroupedQueryAttention(dim, **heads, **kw),
                mlp=MixtureOfExperts(dim, **experts, renormalize=True, **kw),
            )

        blocks = repeat(config.scan_layers, config.num_layers, block, rngs=rngs)
        super().__init__(config, blocks, rngs=rngs)
