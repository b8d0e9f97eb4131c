"""Jamba: one attention layer among seven of Mamba, experts in every other layer, no positions.

Sources: Lieber et al. 2024, "Jamba" (arXiv 2403.19887); AI21 2024, "Jamba-1.5" (arXiv 2408.12570);
the numbers that the papers leave out are those of `JambaForCausalLM` in transformers.
"""

import dataclasses
import functools
import math

from flax import nnx

from slam_jax.errors import require
from slam_jax.language_models.base import PreNormBlock, Transformer
from slam_jax.language_models.config import EXPERTS, LanguageModelConfig
from slam_jax.layers import flops
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.mamba import Mamba
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.stacked import repeat

MAMBA = ("state_dim", "conv_width", "expand", "dt_rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JambaConfig(LanguageModelConfig):
    """mlp_dim: F of a dense MLP and of each expert.

    attention_period, attention_offset: layer i has attention where i % period == offset, and Mamba
      otherwise. expert_period, expert_offset: likewise experts, and a dense MLP otherwise.
    state_dim, conv_width, expand, dt_rank, conv_bias, proj_bias: see `Mamba`.
    The others: see `LanguageModelConfig`.
    """

    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    num_experts: int = 16
    num_experts_per_token: int = 2
    attention_period: int = 8
    attention_offset: int = 4
    expert_period: int = 2
    expert_offset: int = 1
    state_dim: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int | None = None
    conv_bias: bool = True
    proj_bias: bool = False
    balance_loss: float = 0.001
    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        for kind in ("attention", "expert"):
            period, offset = getattr(self, f"{kind}_period"), getattr(self, f"{kind}_offset")
            expected = f"0 to {kind}_period - 1 = {period - 1}"
            require(0 <= offset < period, f"{kind}_offset", offset, expected)

    def has_attention(self, layer: int) -> bool:
        return layer % self.attention_period == self.attention_offset

    def has_experts(self, layer: int) -> bool:
        """Whether the layer has a mixture; a single expert is a dense MLP without a router."""
        return self.num_experts > 1 and layer % self.expert_period == self.expert_offset

    def body_flops(self, num_tokens: int) -> int:
        dim, heads = self.embed_dim, self.sizes("num_heads", "num_kv_heads")
        attention = flops.attention(num_tokens, dim, **heads)
        mamba = flops.mamba(num_tokens, dim, **self.sizes(*MAMBA))
        sparse = flops.mixture_of_experts(num_tokens, dim, **self.sizes(*EXPERTS))
        dense = flops.gated_mlp(num_tokens, dim, self.mlp_dim)
        return sum(
            (attention if self.has_attention(layer) else mamba)
            + (sparse if self.has_experts(layer) else dense)
            for layer in range(self.num_layers)
        )


class Jamba(Transformer):
    """Jamba and Jamba 1.5; the weights of a token's experts are the raw probabilities."""

    def __init__(self, config: JambaConfig, *, rngs: nnx.Rngs):
        dim, experts = config.embed_dim, config.sizes(*EXPERTS)
        heads = config.sizes("num_heads", "num_kv_heads")
        mamba = config.sizes(*MAMBA, "norm_epsilon", "conv_bias", "proj_bias")

        def block(i: int, *, rngs: nnx.Rngs) -> PreNormBlock:
            kw = config.options(rngs)
            if config.has_attention(i):
                mixer = GroupedQueryAttention(dim, **heads, **kw)
            else:
                mixer = Mamba(dim, **mamba, **kw)
            if config.has_experts(i):
                mlp = MixtureOfExperts(dim, **experts, **kw)
            else:
                mlp = GatedMLP(dim, config.mlp_dim, **kw)
            return PreNormBlock(config, mixer, mlp, name="mixer")

        period = math.lcm(config.attention_period, config.expert_period)
        count, rest = divmod(config.num_layers, period)
        each = [functools.partial(block, i) for i in range(period)]
        blocks = repeat(config.scan_layers, count, *each, rngs=rngs)
        blocks += [make(rngs=rngs) for make in each[:rest]]
        super().__init__(config, blocks, rngs=rngs)
