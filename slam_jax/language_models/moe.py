"""Mixture of experts: the standard transformer with several MLPs a layer, two of them a token.

Source: Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088), section 2.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from slam_jax.language_models.base import PreNormBlock, Transformer, rms_norm
from slam_jax.language_models.config import EXPERTS, HEADS, LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.rotary import Rope
from slam_jax.layers.router import load_balancing_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(LanguageModelConfig):
    """mlp_dim: F of one expert. num_experts: E, num_experts_per_token: k. balance_loss: weight of
    the load-balancing loss. The others: see `StandardConfig`."""

    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 8
    num_experts_per_token: int = 2
    balance_loss: float = 0.02
    rope: Rope = Rope()
    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        self.check_heads()
        self.check_experts()

    def body_flops(self, num_tokens: int) -> int:
        attention = flops.attention(num_tokens, self.embed_dim, **self.sizes(*HEADS))
        mlp = flops.mixture_of_experts(num_tokens, self.embed_dim, **self.sizes(*EXPERTS))
        return self.num_layers * (attention + mlp)


class MoE(Transformer):
    """A mixture of experts in every layer; the weights of a token's experts sum to 1."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        kw: Any = dict(**config.dtypes, kernel_init=init, rngs=rngs)
        heads = config.sizes(*HEADS, "rope")
        experts = config.sizes(*EXPERTS) | dict(renormalize=True)
        blocks = [
            PreNormBlock(
                attention_norm=rms_norm(config),
                mlp_norm=rms_norm(config),
                attention=GroupedQueryAttention(config.embed_dim, **heads, **kw),
                mlp=MixtureOfExperts(config.embed_dim, **experts, **kw),
            )
            for _ in range(config.num_layers)
        ]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)

    def balance(self, routings, mask):
        return self.config.balance_loss * load_balancing_loss(routings, mask)
