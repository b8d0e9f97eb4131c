"""DeepSeek-V2, V2-Lite and V2.5: latent attention, many small experts beside shared ones.

Source: DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434), sections 2 and 3.1; the numbers that it
leaves out are those of the released code and configurations.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from slam_jax.errors import require, require_count
from slam_jax.language_models import flops
from slam_jax.language_models.base import LanguageModelConfig, Pass, Transformer
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.latent_attention import MultiHeadLatentAttention
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope
from slam_jax.layers.router import (
    communication_balance_loss,
    device_balance_loss,
    sequence_balance_loss,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(LanguageModelConfig):
    """mlp_dim: F of the dense layers. expert_dim: of one expert.

    num_dense_layers: the first ones have a dense MLP. kv_lora_rank, q_lora_rank, qk_nope_head_dim,
      qk_rope_head_dim, v_head_dim: of `MultiHeadLatentAttention`.
    num_experts, num_experts_per_token: routed ones. num_shared_experts: they are one MLP of as many
      times expert_dim. num_groups, top_groups, routed_scale, renormalize: of `Router`.
    balance_loss, device_balance_loss, communication_balance_loss: weights of the three losses; the
      paper has 0.003, 0.05 and 0.02, the released code 0.001 and no others. The last two need
      `num_groups` devices, of which a token is sent to at most `top_groups`.
    capacity_factor: in training, an expert drops the tokens with the least weight beyond so many
      times its share; the paper has 1.0, by device, the released code nothing.
    init_std: of all maps and the embeddings; the paper has 0.006.
    """

    mlp_dim: int
    expert_dim: int
    num_layers: int
    num_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    num_dense_layers: int = 1
    num_experts: int = 64
    num_experts_per_token: int = 6
    num_shared_experts: int = 2
    num_groups: int = 1
    top_groups: int = 1
    routed_scale: float = 1.0
    renormalize: bool = False
    rope: Rope = Rope(interleaved=True)
    balance_loss: float = 0.001
    device_balance_loss: float = 0.0
    communication_balance_loss: float = 0.0
    capacity_factor: float | None = None
    init_std: float = 0.006

    def __post_init__(self):
        super().__post_init__()
        for field in ("mlp_dim", "expert_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require_count(field, getattr(self, field))
        if self.q_lora_rank is not None:
            require_count("q_lora_rank", self.q_lora_rank)
        require_count("num_layers", self.num_layers, most=512)
        require_count("num_heads", self.num_heads, most=4_096)
        require_count("num_dense_layers", self.num_dense_layers, least=0, most=512)
        require_count("num_shared_experts", self.num_shared_experts, least=0, most=512)
        self.check_experts(self.num_experts, self.num_experts_per_token)
        factor, most = self.capacity_factor, self.num_experts
        within = factor is None or 0 < factor <= most
        require(within, "capacity_factor", factor, f"None, or above 0 and at most {most}")
        rope, groups = self.qk_rope_head_dim, self.num_groups
        require_count("qk_rope_head_dim", rope)
        require(rope % 2 == 0, "qk_rope_head_dim", rope, "an even number above 0")
        expected = f"a divisor of num_experts={self.num_experts}"
        require(groups >= 1 and self.num_experts % groups == 0, "num_groups", groups, expected)
        expected = f"1 to num_groups={groups}"
        require(1 <= self.top_groups <= groups, "top_groups", self.top_groups, expected)
        room = self.top_groups * self.num_experts // groups
        k, expected = self.num_experts_per_token, f"at most {room}, as many as the groups hold"
        require(k <= room, "num_experts_per_token", k, expected)
        for field in ("balance_loss", "device_balance_loss", "communication_balance_loss"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 (off) or more")

    def body_flops(self, num_tokens: int) -> int:
        dense = flops.gated_mlp(num_tokens, self.embed_dim, self.mlp_dim)
        shared_dim = self.num_shared_experts * self.expert_dim
        experts = flops.experts(num_tokens, self, self.expert_dim, shared_dim)
        attention = flops.latents(num_tokens, self) + flops.latent_queries(num_tokens, self)
        num_dense = min(self.num_dense_layers, self.num_layers)
        mlps = num_dense * dense + (self.num_layers - num_dense) * experts
        return self.num_layers * attention + mlps


class Block(nnx.Module):
    """h += attention(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: DeepseekV2Config, layer: int, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        kw: Any = dict(**config.dtypes, kernel_init=init, rngs=rngs)
        norm: Any = dict(epsilon=config.norm_epsilon, param_dtype=kw["param_dtype"])
        self.attention_norm = RMSNorm(config.embed_dim, **norm)
        self.attention = MultiHeadLatentAttention(
            config.embed_dim,
            config.num_heads,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            rope=config.rope,
            **kw,
        )
        self.mlp_norm = RMSNorm(config.embed_dim, **norm)
        if layer < config.num_dense_layers:
            self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, **kw)
        else:
            self.mlp = MixtureOfExperts(
                config.embed_dim,
                config.expert_dim,
                config.num_experts,
                config.num_experts_per_token,
                shared_dim=config.num_shared_experts * config.expert_dim or None,
                capacity_factor=config.capacity_factor,
                num_groups=config.num_groups,
                top_groups=config.top_groups,
                renormalize=config.renormalize,
                scale=config.routed_scale,
                **kw,
            )

    def init_cache(self, batch_shape, max_length):
        return self.attention.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        a, cache = to.mix(self.attention, self.attention_norm(h), cache)
        h = h + a
        if not isinstance(self.mlp, MixtureOfExperts):
            return h + self.mlp(self.mlp_norm(h)), cache, ()
        y, routing = self.mlp(self.mlp_norm(h), mask=to.mask, training=to.training)
        return h + y, cache, [routing]


class DeepseekV2(Transformer):
    """A token keeps kv_lora_rank + qk_rope_head_dim numbers a layer."""

    def __init__(self, config: DeepseekV2Config, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        blocks = [Block(config, layer, rngs=rngs) for layer in range(config.num_layers)]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)

    def balance(self, routings, mask):
        """The three losses, summed over layers."""
        config, total = self.config, 0.0
        devices = (config.num_groups, config.top_groups)
        for routing in routings:
            total += config.balance_loss * sequence_balance_loss(routing, mask)
            if config.device_balance_loss:
                loss = device_balance_loss(routing, config.num_groups, mask)
                total += config.device_balance_loss * loss
            if config.communication_balance_loss:
                loss = communication_balance_loss(routing, *devices, mask)
                total += config.communication_balance_loss * loss
        return total
