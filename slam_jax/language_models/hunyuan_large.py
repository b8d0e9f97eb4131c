"""Hunyuan-Large: a shared expert beside one routed expert; every other layer has keys and values.

Source: Sun et al. 2024, "Hunyuan-Large" (arXiv 2411.02265), section 2.2; the numbers that it leaves
out are those of the released modelling file. That file has a cache for every layer; here a layer
without its own keys has none. The paper's "recycle routing", which sends tokens beyond an expert's
capacity to random experts, is switched off in the release and not built here.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx

from slam_jax.language_models.base import ForwardPass, Transformer, feed_forward, rms_norm
from slam_jax.language_models.config import EXPERTS, HEADS, TransformerConfig
from slam_jax.layers import flops
from slam_jax.layers.cross_layer_attention import CrossLayerAttention, SharedKeyValues
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.rotary import Rope
from slam_jax.layers.router import load_balancing_loss
from slam_jax.layers.stacked import repeat


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanLargeConfig(TransformerConfig):
    """mlp_dim: F of one expert. num_shared_experts: they are one MLP of this many times mlp_dim.

    share_factor: layers that read one layer's keys and values, that layer included; 1 = each has
      its own. qk_norm: norms over each head of the rotated queries and keys.
    balance_loss: the release computes this loss in each layer and discards it; the mean over layers
      and the weight (of Switch Transformers) are ours. capacity_factor: None, as released.
    The others: see `LanguageModelConfig`.
    """

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

    def body_flops(self, num_tokens: int) -> int:
        dim, heads, experts = self.embed_dim, self.sizes(*HEADS), self.sizes(*EXPERTS)
        shared_dim = self.num_shared_experts * self.mlp_dim
        mlp = flops.mixture_of_experts(num_tokens, dim, **experts, shared_dim=shared_dim)
        attention = [
            flops.attention(num_tokens, dim, **heads, own_keys=layer % self.share_factor == 0)
            for layer in range(self.num_layers)
        ]
        return self.num_layers * mlp + sum(attention)


class Layer(nnx.Module):
    """h += attention(norm(h)); h += experts(norm(h)).

    own_keys: whether the layer makes keys and values, for itself and the layers after it.
    """

    def __init__(self, config: HunyuanLargeConfig, *, own_keys: bool, rngs: nnx.Rngs):
        dim, heads, kw = config.embed_dim, config.num_heads, config.options(rngs)
        head_dim, num_kv_heads = config.head_dim or dim // heads, config.num_kv_heads or heads
        self.attention_norm, self.mlp_norm = rms_norm(config), rms_norm(config)
        self.key_values = SharedKeyValues(dim, num_kv_heads, head_dim, **kw) if own_keys else None
        epsilon = config.norm_epsilon if config.qk_norm else None
        reader: Any = dict(rope=config.rope, qk_norm_epsilon=epsilon)
        self.attention = CrossLayerAttention(dim, heads, head_dim, **reader, **kw)
        experts = config.sizes(*EXPERTS, "capacity_factor")
        experts |= dict(shared_dim=config.num_shared_experts * config.mlp_dim or None)
        experts |= dict(renormalize=config.num_experts_per_token > 1)
        self.mlp = MixtureOfExperts(dim, **experts, **kw)


class Block(nnx.Module):
    """The layers that read the keys and values of the first of them, and their one cache."""

    def __init__(self, config: HunyuanLargeConfig, num_layers: int, *, rngs: nnx.Rngs):
        layers = [Layer(config, own_keys=i == 0, rngs=rngs) for i in range(num_layers)]
        self.layers: Any = nnx.List(layers)

    def init_cache(self, batch_shape, max_length):
        return self.layers[0].key_values.init_cache(batch_shape, max_length)

    def __call__(self, h, forward: ForwardPass, cache, key):
        shared, routings = None, []
        for layer in self.layers:
            x = layer.attention_norm(h)
            if layer.key_values is not None:
                shared, cache = forward.mix(layer.key_values, x, cache)
            h = h + layer.attention(x, shared, forward.positions)
            y, routing = feed_forward(layer.mlp, layer.mlp_norm(h), forward)
            h = h + y
            routings += routing
        return h, cache, routings


class HunyuanLarge(Transformer):
    """One cache for `share_factor` layers; a single expert is weighted by its probability."""

    def __init__(self, config: HunyuanLargeConfig, *, rngs: nnx.Rngs):
        layers, share = config.num_layers, config.share_factor
        count, rest = divmod(layers, share)
        block = functools.partial(Block, config, share)
        blocks = repeat(config.scan_layers, count, block, rngs=rngs)
        blocks += [Block(config, rest, rngs=rngs)] if rest else []
        super().__init__(config, blocks, rngs=rngs)

    def balance(self, routings, mask):
        """E sum_e f_e P_e of each layer, and the mean over layers."""
        losses = [load_balancing_loss([routing], mask) for routing in routings]
        return self.config.balance_loss * sum(losses) / len(losses)
