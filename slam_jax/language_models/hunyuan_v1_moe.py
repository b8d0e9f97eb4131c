"""Hunyuan-A13B, the smaller and later mixture of experts of Hunyuan-Large's publisher.

It is not one of the nine systems; its weights load through `slam_jax.interop`. Unlike Hunyuan-Large
it has no cross-layer attention, and the weights of a token's experts sum to 1.

Source: `HunYuanMoEV1ForCausalLM` in transformers.
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
class HunyuanV1MoEConfig(LanguageModelConfig):
    """mlp_dim: F, of one expert and of the one shared MLP. balance_loss: weight of the
    load-balancing loss, which the published code lacks. The others: see `MoEConfig`."""

    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 64
    num_experts_per_token: int = 8
    norm_epsilon: float = 1e-5
    rope: Rope = Rope()
    balance_loss: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        self.check_heads()
        self.check_experts()

    def body_flops(self, num_tokens: int) -> int:
        attention = flops.attention(num_tokens, self.embed_dim, **self.sizes(*HEADS))
        experts = self.sizes(*EXPERTS)
        mlp = flops.mixture_of_experts(
            num_tokens, self.embed_dim, **experts, shared_dim=self.mlp_dim
        )
        return self.num_layers * (attention + mlp)


class HunyuanV1MoE(Transformer):
    """Grouped queries with norms of queries and keys, one shared MLP beside k experts."""

    def __init__(self, config: HunyuanV1MoEConfig, *, rngs: nnx.Rngs):
        dim, init = config.embed_dim, jax.nn.initializers.normal(config.init_std)
        kw: Any = dict(**config.dtypes, kernel_init=init, rngs=rngs)
        heads = config.sizes(*HEADS, "rope") | dict(qk_norm_epsilon=config.norm_epsilon)
        experts = config.sizes(*EXPERTS) | dict(shared_dim=config.mlp_dim, renormalize=True)
        blocks = [
            PreNormBlock(
                attention_norm=rms_norm(config),
                mlp_norm=rms_norm(config),
                attention=GroupedQueryAttention(dim, **heads, **kw),
                mlp=MixtureOfExperts(dim, **experts, **kw),
            )
            for _ in range(config.num_layers)
        ]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)

    def balance(self, routings, mask):
        return self.config.balance_loss * load_balancing_loss(routings, mask)
