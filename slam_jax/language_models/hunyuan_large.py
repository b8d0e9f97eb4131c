"""Hunyuan-Large: a shared expert beside one routed one, keys and values of every other layer only.

Source: Sun et al. 2024, "Hunyuan-Large" (arXiv 2411.02265), section 2.2; the numbers that it leaves
out are those of the released modelling file. That file keeps a cache for every layer; here a layer
without keys of its own keeps nothing. What the paper has and the release has switched off is not
built: tokens beyond an expert's capacity being sent on at random ("recycle routing").
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from slam_jax.errors import require, require_count
from slam_jax.language_models import flops
from slam_jax.language_models.base import LanguageModelConfig, Pass, Transformer
from slam_jax.layers.cross_layer_attention import CrossLayerAttention, SharedKeyValues
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope
from slam_jax.layers.router import load_balancing_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanLargeConfig(LanguageModelConfig):
    """mlp_dim: F, of one expert. num_shared_experts: they are one MLP of as many times mlp_dim.

    share_factor: layers that read one layer's keys and values, that layer among them; 1 = each has
      its own. qk_norm: norms over each head of the turned queries and keys.
    balance_loss: weight of the load-balancing loss. The release computes that loss in each layer
      and throws it away; the mean over layers, and the weight (Switch Transformers') are ours.
    capacity_factor: in training, an expert drops the tokens with the least weight beyond so many
      times its share; None = drops none, as released.
    The others: see `MoEConfig`.
    """

    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 16
    num_experts_per_token: int = 1
    num_shared_experts: int = 1
    share_factor: int = 2
    qk_norm: bool = True
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    rope: Rope = Rope(ntk_alpha=1_000.0)
    balance_loss: float = 0.01
    capacity_factor: float | None = None
    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        require_count("mlp_dim", self.mlp_dim)
        require_count("num_layers", self.num_layers, most=512)
        require_count("share_factor", self.share_factor, most=512)
        require_count("num_shared_experts", self.num_shared_experts, least=0, most=512)
        self.check_heads(
            self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim, turned=True
        )
        self.check_experts(self.num_experts, self.num_experts_per_token)
        factor, most = self.capacity_factor, self.num_experts
        within = factor is None or 0 < factor <= most
        require(within, "capacity_factor", factor, f"None, or above 0 and at most {most}")
        require(self.balance_loss >= 0, "balance_loss", self.balance_loss, "0 (off) or more")

    def body_flops(self, num_tokens: int) -> int:
        shared_dim = self.num_shared_experts * self.mlp_dim
        mlp = flops.experts(num_tokens, self, self.mlp_dim, shared_dim)
        layers = (layer % self.share_factor == 0 for layer in range(self.num_layers))
        return sum(flops.attention(num_tokens, self, own_keys=owns) + mlp for owns in layers)


class Layer(nnx.Module):
    """h += attention(norm(h)); h += experts(norm(h)). It makes keys and values if it `owns` any."""

    def __init__(self, config: HunyuanLargeConfig, *, owns: bool, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        kw: Any = dict(**config.dtypes, kernel_init=init, rngs=rngs)
        norm: Any = dict(epsilon=config.norm_epsilon, param_dtype=kw["param_dtype"])
        dim, head_dim = config.embed_dim, config.head_dim or config.embed_dim // config.num_heads
        num_kv_heads = config.num_kv_heads or config.num_heads
        self.attention_norm = RMSNorm(dim, **norm)
        self.key_values = SharedKeyValues(dim, num_kv_heads, head_dim, **kw) if owns else None
        self.attention = CrossLayerAttention(
            dim,
            config.num_heads,
            head_dim,
            rope=config.rope,
            qk_norm_epsilon=config.norm_epsilon if config.qk_norm else None,
            **kw,
        )
        self.mlp_norm = RMSNorm(dim, **norm)
        self.mlp = MixtureOfExperts(
            dim,
            config.mlp_dim,
            config.num_experts,
            config.num_experts_per_token,
            shared_dim=config.num_shared_experts * config.mlp_dim or None,
            capacity_factor=config.capacity_factor,
            renormalize=config.num_experts_per_token > 1,
            **kw,
        )


class Block(nnx.Module):
    """The layers that read one layer's keys and values, and their one cache."""

    def __init__(self, config: HunyuanLargeConfig, num_layers: int, *, rngs: nnx.Rngs):
        self.layers: Any = nnx.List(
            [Layer(config, owns=i == 0, rngs=rngs) for i in range(num_layers)]
        )

    def init_cache(self, batch_shape, max_length):
        return self.layers[0].key_values.init_cache(batch_shape, max_length)

    def __call__(self, h, to: Pass, cache, key):
        shared, routings = None, []
        for layer in self.layers:
            x = layer.attention_norm(h)
            if layer.key_values is not None:
                shared, cache = to.mix(layer.key_values, x, cache)
            h = h + layer.attention(x, shared, to.positions)
            y, routing = layer.mlp(layer.mlp_norm(h), mask=to.mask, training=to.training)
            h = h + y
            routings.append(routing)
        return h, cache, routings


class HunyuanLarge(Transformer):
    """A cache for 1 in `share_factor` layers; a single expert is weighted by its probability."""

    def __init__(self, config: HunyuanLargeConfig, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(config.init_std)
        firsts = range(0, config.num_layers, config.share_factor)
        sizes = [min(config.share_factor, config.num_layers - first) for first in firsts]
        blocks = [Block(config, size, rngs=rngs) for size in sizes]
        super().__init__(config, blocks, embedding_init=init, head_init=init, rngs=rngs)

    def balance(self, routings, mask):
        """E sum_e f_e P_e of each layer, and the mean over layers."""
        losses = [load_balancing_loss([routing], mask) for routing in routings]
        return self.config.balance_loss * sum(losses) / len(losses)
