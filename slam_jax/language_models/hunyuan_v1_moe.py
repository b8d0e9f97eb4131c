"""Hunyuan-A13B, the smaller and later mixture of experts of Hunyuan-Large's publisher.

It is not one of the nine systems; its weights load through `slam_jax.interop`. Unlike Hunyuan-Large
it has no cross-layer attention, and the weights of a token's experts sum to 1.

Source: `HunYuanMoEV1ForCausalLM` in transformers.
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
class HunyuanV1MoEConfig(TransformerConfig):
    """mlp_dim: F, of one expert and of the one shared MLP. balance_loss: its default is 0, because
    the published code has none. The others: see `LanguageModelConfig`."""

    num_experts: int = 64
    num_experts_per_token: int = 8
    norm_epsilon: float = 1e-5
    balance_loss: float = 0.0

    def body_flops(self, num_tokens: int) -> int:
        dim, experts = self.embed_dim, self.sizes(*EXPERTS)
        attention = flops.attention(num_tokens, dim, **self.sizes(*HEADS))
        mlp = flops.mixture_of_experts(num_tokens, dim, **experts, shared_dim=self.mlp_dim)
        return self.num_layers * (attention + mlp)


class HunyuanV1MoE(Transformer):
    """Grouped queries with norms of queries and keys, one shared MLP beside k experts."""

    def __init__(self, config: HunyuanV1MoEConfig, *, rngs: nnx.Rngs):
        dim = config.embed_dim
        heads = config.sizes(*HEADS, "rope") | dict(qk_norm_epsilon=config.norm_epsilon)
        experts = config.sizes(*EXPERTS) | dict(shared_dim=config.mlp_dim, renormalize=True)

        def block(*, rngs: nnx.Rngs) -> PreNormBlock:
            kw = config.options(rngs)
            return PreNormBlock(
                config,
                attention=GroupedQueryAttention(dim, **heads, **kw),
                mlp=MixtureOfExperts(dim, **experts, **kw),
            )

        blocks = repeat(config.scan_layers, config.num_layers, block, rngs=rngs)
        super().__init__(config, blocks, rngs=rngs)
