"""Hunyuan-A13B, the smaller and later mixture of experts of the same publisher.

Not one of the nine systems; its weights load through `slam_jax.interop`. Beside Hunyuan-Large it
lacks cross-layer attention, and the weights of a token's experts sum to 1.

Source: `HunYuanMoEV1ForCausalLM` in transformers.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from slam_jax.errors import require, require_count
from slam_jax.language_models import flops
from slam_jax.language_models.base import LanguageModelConfig, Pass, Transformer
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.norms import RMSNorm
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
        require_count("mlp_dim", self.mlp_dim)
        require_count("num_layers", self.num_layers, most=512)
        self.check_heads(
            self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim, turned=True
        )
        self.check_experts(self.num_experts, self.num_experts_per_token)
        require(self.balance_loss >= 0, "balance_loss", self.balance_loss, "0 (off) or more")

    def body_flops(self, num_tokens: int) -> int:
        mlp = flops.experts(num_tokens, self, self.mlp_dim, self.mlp_dim)
        return self.num_layers * (flops.attention(num_tokens, self) + mlp)


class Block(nnx.Module):
    """h += attention(norm(h)); h += shared(norm(h)) + experts(norm(h))."""

    def __init__(self, config: HunyuanV1MoEConfig, *, rngs: nnx.Rngs):
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
            qk_norm_epsilon=config.norm_epsilon,
            **kw,
        )
        self.mlp_norm = RMSNorm(config.embed_dim, **norm)
        self.mlp = MixtureOfExperts(
            config.embed_dim,
            config.mlp_dim,
            config.num_experts,
            config.num_experts_per_token,
            shared_dim=config.mlp_dim,
            renormalize=True,
            **kw,
        )

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        a, cache = to.mix(self.attention, self.attention_norm(h), cache)
        h = h + a
        y, routing = self.mlp(self.mlp_norm(h), mask=to.mask, training=to.training)
        return h + y, cache, [routing]


class HunyuanV1MoE(Transformer):
    """Grouped queries with norms on queries and keys, one shared MLP beside k experts."""

    def __init__(self, config: HunyuanV1MoEConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        blocks = [Block(config, rngs=rngs) for _ in range(config.num_layers)]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)

    def balance(self, routings, mask):
        return self.config.balance_loss * load_balancing_loss(routings, mask)
