"""The decoder: causal latent attention over the text so far, latent attention over the memory."""

from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.kv_cache import KVCache
from slam_jax.layers.latent_attention import (
    LatentCache,
    LatentCrossAttention,
    MultiHeadLatentAttention,
)
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.remat import remat
from slam_jax.layers.rotary import Rope
from slam_jax.slam_v3.config import SlamV3Config

# One per layer and no stack of them: a decoding step then updates each in place. A `KVCache` where
# the decoder is without its latents.
LayerCache = LatentCache | KVCache
DecoderCache = tuple[LayerCache, ...]


@struct.dataclass
class Memory:
    """One encode: a latent per memory token, shared by every decoder layer, question and sample.

    mask: True = present, None = all present.
    """

    c_mem: Float[Array, "B M R"]
    mask: Bool[Array, "B M"] | None = None


class MemoryBank(nnx.Module):
    """From fused tokens to their normed latents; without "latent", to themselves, normed."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        param_dtype = kw["param_dtype"]
        self.norm_in = RMSNorm(config.embed_dim, param_dtype=param_dtype)
        latent, rank = config.has("latent"), config.kv_lora_rank
        self.down = Linear(config.embed_dim, rank, **kw) if latent else None
        self.norm: Any = RMSNorm(rank, param_dtype=param_dtype) if latent else None

    def __call__(self, fused: Float[Array, "B M D"], mask: Bool[Array, "B M"] | None) -> Memory:
        c_mem = self.norm_in(fused)
        return Memory(c_mem if self.down is None else self.norm(self.down(c_mem)), mask)


class DecoderLayer(nnx.Module):
    """Latent self-attention, memory attention, SwiGLU; each pre-norm and residual.

    Tokens are [B, Q, T, D] and the memory is [B, M, R]: every question of an example, and every
    position of it, is one more query to the same bank.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, scale, widths = config.embed_dim, config.decoder_out_scale, config.latent_widths
        self.dropout = config.dropout
        self.norms = nnx.List([RMSNorm(dim, param_dtype=kw["param_dtype"]) for _ in range(3)])
        self.attention: Any
        if config.has("latent"):
            self.attention = MultiHeadLatentAttention(
                dim,
                config.num_heads,
                kv_lora_rank=config.kv_lora_rank,
                q_lora_rank=config.q_lora_rank,
                **widths,
                window=config.window,
                out_scale=scale,
                **kw,
            )
        else:
            self.attention = GroupedQueryAttention(
                dim, config.num_heads, rope=Rope(), out_scale=scale, **kw
            )
        # To a memory of full width the same is plain attention.
        self.memory_attention = LatentCrossAttention(
            dim,
            config.num_heads,
            kv_lora_rank=config.memory_dim,
            qk_head_dim=widths["qk_nope_head_dim"],
            v_head_dim=widths["v_head_dim"],
            out_scale=scale,
            **kw,
        )
        self.mlp = GatedMLP(dim, config.mlp_dim, out_scale=scale, **kw)

    def __call__(self, h, memory: Memory, *, key: PRNGKeyArray | None = None):
        keys = split(key, 2)
        h = h + dropout(self.attention(self.norms[0](h)), self.dropout, keys[0])
        return self._rest(h, memory, keys[1], absorbed=False)

    def prefill(self, h, cache: LayerCache, memory: Memory, lengths):
        a, cache = self.attention.prefill(self.norms[0](h), cache, lengths)
        return self._rest(h + a, memory, None, absorbed=False), cache

    def decode_step(self, h, cache: LayerCache, memory: Memory):
        a, cache = self.attention.decode_step(self.norms[0](h), cache)
        return self._rest(h + a, memory, None, absorbed=True), cache

    def memory_weights(
        self, h: Float[Array, "B Q T D"], memory: Memory
    ) -> Float[Array, "B N Q T M"]:
        """How much each token, as the layer is given it, attends to each memory token."""
        h = h + self.attention(self.norms[0](h))
        weights = self.memory_attention.weights(self._queries(h), memory.c_mem, _row_mask(memory))
        return weights.reshape(*weights.shape[:2], *h.shape[1:3], -1)

    def _queries(self, h):
        """Every position of every question of an example, one after the other."""
        queries = self.norms[1](h)
        batch, prompts, length, dim = queries.shape
        return queries.reshape(batch, prompts * length, dim)

    def _rest(self, h, memory, key, *, absorbed):
        keys = split(key, 2)
        read = self.memory_attention(
            self._queries(h), memory.c_mem, _row_mask(memory), absorbed=absorbed
        )
        h = h + dropout(read.reshape(h.shape), self.dropout, keys[0])
        return h + dropout(self.mlp(self.norms[2](h)), self.dropout, keys[1])


def _row_mask(memory: Memory) -> Bool[Array, "B 1 M"] | None:
    return None if memory.mask is None else memory.mask[:, None, :]


class Decoder(nnx.Module):
    """The layers and the final norm, from embedded tokens to what the head reads."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        self.dropout, self.remat = config.dropout, config.remat
        self.layers = nnx.List(
            [DecoderLayer(config, rngs=rngs) for _ in range(config.num_decoder_layers)]
        )
        self.norm = RMSNorm(config.embed_dim, param_dtype=config.dtypes["param_dtype"])

    def __call__(
        self, h: Float[Array, "B Q T D"], memory: Memory, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B Q T D"]:
        keys = split(key, len(self.layers) + 1)
        h = dropout(h, self.dropout, keys[-1])
        for layer, layer_key in zip(self.layers, keys, strict=False):
            h = constrain(remat(layer, self.remat)(h, memory, key=layer_key), ("batch",))
        return self.norm(h)

    def memory_weights(
        self, h: Float[Array, "B Q T D"], memory: Memory
    ) -> Float[Array, "B layers N Q T M"]:
        """How much each head of each layer attends to each memory token."""
        weights = []
        for layer in self.layers:
            weights.append(layer.memory_weights(h, memory))
            h = layer(h, memory)
        return jnp.stack(weights, axis=1)

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> DecoderCache:
        return tuple(layer.attention.init_cache(batch_shape, max_length) for layer in self.layers)

    def prefill(
        self,
        h: Float[Array, "B Q T D"],
        cache: DecoderCache,
        memory: Memory,
        lengths: Int[Array, "B Q"] | None,
    ) -> tuple[Float[Array, "B Q T D"], DecoderCache]:
        new = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h, layer_cache = layer.prefill(h, layer_cache, memory, lengths)
            new.append(layer_cache)
        return self.norm(h), tuple(new)

    def decode_step(
        self, h: Float[Array, "B Q 1 D"], cache: DecoderCache, memory: Memory
    ) -> tuple[Float[Array, "B Q 1 D"], DecoderCache]:
        new = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h, layer_cache = layer.decode_step(h, layer_cache, memory)
            new.append(layer_cache)
        return self.norm(h), tuple(new)
