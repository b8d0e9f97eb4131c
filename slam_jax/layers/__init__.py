"""One idea a file; every layer is usable by itself."""

from slam_jax.layers.attention import SelfAttention, attend, masked_softmax
from slam_jax.layers.latent_attention import (
    LatentCache,
    LatentCrossAttention,
    MultiHeadLatentAttention,
    latent_attend,
)
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import rotary

__all__ = [
    "GatedMLP",
    "LatentCache",
    "LatentCrossAttention",
    "MultiHeadLatentAttention",
    "RMSNorm",
    "SelfAttention",
    "attend",
    "latent_attend",
    "masked_softmax",
    "rotary",
]
