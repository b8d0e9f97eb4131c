"""Jamba: one attention layer among seven of Mamba, experts in every other layer, no positions.

Sources: Lieber et al. 2024, "Jamba" (arXiv 2403.19887); AI21 2024, "Jamba-1.5" (arXiv 2408.12570);
the numbers that the papers leave out are those of `JambaForCausalLM` in transformers.
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
from slam_jax.layers.mamba import Mamba
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.router import load_balancing_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class JambaConfig(LanguageModelConfig):
    """mlp_dim: F, of dense MLPs and of each expert alike.

    attention_period, attention_offset: layer i has attention where i % period == offset, and Mamba
      otherwise. expert_period, expert_offset: likewise experts, and a dense MLP otherwise.
    state_dim, conv_width, expand, dt_rank, conv_bias, proj_bias: of `Mamba`.
    balance_loss: weight of the load-balancing loss.
    The others: see `StandardConfig`.
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
        require_count("mlp_dim", self.mlp_dim)
        require_count("num_layers", self.num_layers, most=512)
        self.check_heads(self.num_heads, self.num_kv_heads or self.num_heads, None)
        self.check_experts(self.num_experts, self.num_experts_per_token)
        for kind in ("attention", "expert"):
            period, offset = getattr(self, f"{kind}_period"), getattr(self, f"{kind}_offset")
            require_count(f"{kind}_period", period, most=512)
            expected = f"0 to {kind}_period - 1 = {period - 1}"
            require(0 <= offset < period, f"{kind}_offset", offset, expected)
        for field in ("state_dim", "conv_width", "expand"):
            require_count(field, getattr(self, field), most=4_096)
        if self.dt_rank is not None:
            require_count("dt_rank", self.dt_rank)
        require(self.balance_loss >= 0, "balance_loss", self.balance_loss, "0 (off) or more")

    def has_attention(self, layer: int) -> bool:
        return layer % self.attention_period == self.attention_offset

    def has_experts(self, layer: int) -> bool:
        """One expert is a dense MLP and needs no router."""
        return self.num_experts > 1 and layer % self.expert_period == self.expert_offset

    def body_flops(self, num_tokens: int) -> int:
        total = 0
        for layer in range(self.num_layers):
            if self.has_attention(layer):
                total += flops.attention(num_tokens, self)
            else:
                total += self._mamba_flops(num_tokens)
            if self.has_experts(layer):
                total += flops.experts(num_tokens, self, self.mlp_dim)
            else:
                total += flops.gated_mlp(num_tokens, self.embed_dim, self.mlp_dim)
        return total

    def _mamba_flops(self, num_tokens: int) -> int:
        width, rank = self.expand * self.embed_dim, self.dt_rank or -(-self.embed_dim // 16)
        maps = flops.linear(num_tokens, self.embed_dim, 3 * width)
        maps += flops.linear(num_tokens, width, 2 * rank + 2 * self.state_dim)
        convolution = 2 * num_tokens * width * self.conv_width
        # dt A, times the state, dt x B, their sum, times C, the sum over the state.
        return maps + convolution + 6 * num_tokens * width * self.state_dim


class Block(nnx.Module):
    """h += mixer(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: JambaConfig, layer: int, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        kw: Any = dict(**config.dtypes, kernel_init=init, rngs=rngs)
        norm: Any = dict(epsilon=config.norm_epsilon, param_dtype=kw["param_dtype"])
        self.mixer_norm = RMSNorm(config.embed_dim, **norm)
        if config.has_attention(layer):
            self.mixer = GroupedQueryAttention(
                config.embed_dim, config.num_heads, num_kv_heads=config.num_kv_heads, **kw
            )
        else:
            self.mixer = Mamba(
                config.embed_dim,
                state_dim=config.state_dim,
                conv_width=config.conv_width,
                expand=config.expand,
                dt_rank=config.dt_rank,
                norm_epsilon=config.norm_epsilon,
                conv_bias=config.conv_bias,
                proj_bias=config.proj_bias,
                **kw,
            )
        self.mlp_norm = RMSNorm(config.embed_dim, **norm)
        if config.has_experts(layer):
            self.mlp = MixtureOfExperts(
                config.embed_dim,
                config.mlp_dim,
                config.num_experts,
                config.num_experts_per_token,
                **kw,
            )
        else:
            self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, **kw)

    def init_cache(self, batch_shape, max_length):
        return self.mixer.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        y, cache = to.mix(self.mixer, self.mixer_norm(h), cache)
        h = h + y
        if not isinstance(self.mlp, MixtureOfExperts):
            return h + self.mlp(self.mlp_norm(h)), cache, ()
        y, routing = self.mlp(self.mlp_norm(h), mask=to.mask, training=to.training)
        return h + y, cache, [routing]


class Jamba(Transformer):
    """Jamba and Jamba 1.5; the weights of a token's experts are the raw probabilities."""

    def __init__(self, config: JambaConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        blocks = [Block(config, layer, rngs=rngs) for layer in range(config.num_layers)]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)

    def balance(self, routings, mask):
        return self.config.balance_loss * load_balancing_loss(routings, mask) if routings else 0.0
