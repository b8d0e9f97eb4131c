"""DeepSeek-V2, V2-Lite, V2.5 and V3: latent attention, many small experts beside shared ones.

Source: DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434), sections 2 and 3.1; the numbers that it
leaves out are those of the released code and configurations. DeepSeek-AI 2024, "DeepSeek-V3" (arXiv
2412.19437), section 2.1; its prediction of further tokens is not built.
"""

import dataclasses

from flax import nnx

from slam_jax.errors import require
from slam_jax.language_models.base import PreNormBlock, Transformer
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.latent_attention import MultiHeadLatentAttention
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.rotary import Rope
from slam_jax.layers.router import (
    communication_balance_loss,
    device_balance_loss,
    sequence_balance_loss,
)
from slam_jax.layers.stacked import repeat

LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(LanguageModelConfig):
    """mlp_dim: F of the dense layers. expert_dim: F of one expert.

    num_dense_layers: so many first layers have a dense MLP. kv_lora_rank, q_lora_rank,
      qk_nope_head_dim, qk_rope_head_dim, v_head_dim: see `MultiHeadLatentAttention`.
    num_experts, num_experts_per_token: of the routed experts. num_shared_experts: they are one MLP
      of this many times expert_dim. num_groups, top_groups, routed_scale (`scale`), renormalize:
      see `Router`. sigmoid: the routing of V3, see `Router`.
    balance_loss, device_balance_loss, communication_balance_loss: weights of the three losses; the
      paper has 0.003, 0.05 and 0.02, the released code 0.001 and no others. The last two assume
      `num_groups` devices, of which a token is sent to at most `top_groups`.
    capacity_factor: the paper has 1.0 for each device, the released code none. init_std: that of
      the paper. The others: see `LanguageModelConfig`.
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
    sigmoid: bool = False
    rope: Rope = Rope(interleaved=True)
    balance_loss: float = 0.001
    device_balance_loss: float = 0.0
    communication_balance_loss: float = 0.0
    capacity_factor: float | None = None
    init_std: float = 0.006

    def __post_init__(self):
        super().__post_init__()
        k, groups = self.num_experts_per_token, self.num_groups
        expected = f"a divisor of num_experts={self.num_experts}"
        require(groups >= 1 and self.num_experts % groups == 0, "num_groups", groups, expected)
        expected = f"1 to num_groups={groups}"
        require(1 <= self.top_groups <= groups, "top_groups", self.top_groups, expected)
        most = self.top_groups * self.num_experts // groups
        expected = f"at most {most}, as many as the groups hold"
        require(k <= most, "num_experts_per_token", k, expected)

    def body_flops(self, num_tokens: int) -> int:
        dim, experts = self.embed_dim, self.sizes("num_experts", "num_experts_per_token")
        experts |= dict(shared_dim=self.num_shared_experts * self.expert_dim)
        attention = flops.latent_attention(num_tokens, dim, self.num_heads, **self.sizes(*LATENT))
        dense = flops.gated_mlp(num_tokens, dim, self.mlp_dim)
        sparse = flops.mixture_of_experts(num_tokens, dim, self.expert_dim, **experts)
        num_dense = min(self.num_dense_layers, self.num_layers)
        mlps = num_dense * dense + (self.num_layers - num_dense) * sparse
        return self.num_layers * attention + mlps


class DeepseekV2(Transformer):
    """The cache has kv_lora_rank + qk_rope_head_dim numbers for each token and layer."""

    def __init__(self, config: DeepseekV2Config, *, rngs: nnx.Rngs):
        dim, latent = config.embed_dim, config.sizes("num_heads", "rope", *LATENT)
        experts = config.sizes(
            *("num_experts", "num_experts_per_token", "num_groups", "top_groups"),
            *("renormalize", "sigmoid"),
        )
        experts |= dict(scale=config.routed_scale, capacity_factor=config.capacity_factor)
        experts |= dict(shared_dim=config.num_shared_experts * config.expert_dim or None)

        def dense(*, rngs: nnx.Rngs) -> PreNormBlock:
            kw = config.options(rngs)
            attention = MultiHeadLatentAttention(dim, **latent, **kw)
            return PreNormBlock(config, attention, GatedMLP(dim, config.mlp_dim, **kw))

        def sparse(*, rngs: nnx.Rngs) -> PreNormBlock:
            kw = config.options(rngs)
            attention = MultiHeadLatentAttention(dim, **latent, **kw)
            mlp = MixtureOfExperts(dim, config.expert_dim, **experts, **kw)
            return PreNormBlock(config, attention, mlp)

        scan, num_dense = config.scan_layers, min(config.num_dense_layers, config.num_layers)
        blocks = repeat(scan, num_dense, dense, rngs=rngs)
        blocks += repeat(scan, config.num_layers - num_dense, sparse, rngs=rngs)
        super().__init__(config, blocks, rngs=rngs)

    def balance(self, routings, mask):
        """The three losses, summed over layers."""
        config, total = self.config, 0.0
        groups, top = config.num_groups, config.top_groups
        for r in routings:
            total += config.balance_loss * sequence_balance_loss(r, mask)
            if weight := config.device_balance_loss:
                total += weight * device_balance_loss(r, groups, mask)
            if weight := config.communication_balance_loss:
                total += weight * communication_balance_loss(r, groups, top, mask)
        return total
