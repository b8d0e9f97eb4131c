"""Layers, one idea per file; each can be used by itself."""

from slam_jax.layers.attention import (
    Layout,
    SelfAttention,
    attend,
    causal_layout,
    masked_softmax,
)
from slam_jax.layers.cross_layer_attention import (
    CrossLayerAttention,
    KeyValues,
    SharedKeyValues,
)
from slam_jax.layers.experts import Experts, MixtureOfExperts
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.kv_cache import KVCache
from slam_jax.layers.latent_attention import (
    LatentCache,
    LatentCrossAttention,
    MultiHeadLatentAttention,
    latent_attend,
)
from slam_jax.layers.mamba import Mamba, MambaCache, selective_scan
from slam_jax.layers.masks import Causal
from slam_jax.layers.mlp import MLP, GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope, Yarn, rotary
from slam_jax.layers.router import (
    Router,
    Routing,
    communication_balance_loss,
    device_balance_loss,
    load_balancing_loss,
    sequence_balance_loss,
)
from slam_jax.layers.short_convolution import ShortConvolution

__all__ = [
    "MLP",
    "Causal",
    "CrossLayerAttention",
    "Experts",
    "GatedMLP",
    "GroupedQueryAttention",
    "KVCache",
    "KeyValues",
    "LatentCache",
    "LatentCrossAttention",
    "Layout",
    "Mamba",
    "MambaCache",
    "MixtureOfExperts",
    "MultiHeadLatentAttention",
    "RMSNorm",
    "Rope",
    "Router",
    "Routing",
    "SelfAttention",
    "SharedKeyValues",
    "ShortConvolution",
    "Yarn",
    "attend",
    "causal_layout",
    "communication_balance_loss",
    "device_balance_loss",
    "latent_attend",
    "load_balancing_loss",
    "masked_softmax",
    "rotary",
    "selective_scan",
    "sequence_balance_loss",
]
