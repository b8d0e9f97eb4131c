"""The decoder: causal latent attention to the text so far, and latent attention to the memory."""

import functools
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

# One cache per layer and not a stack, so that a decoding step updates each in place. A `KVCache`
# where `config.without` has "latent".
LayerCache = LatentCache | KVCache
DecoderCache = tuple[LayerCache, ...]


@struct.dataclass
class Memory:
    """The result of one encode: a latent per memory token, shared by all decoder layers, questions
    and samples.

    mask: True = present, None = all present.
    """

    c_mem: Float[Array, "B M R"]
    mask: Bool[Array, "B M"] | None = None


class MemoryBank(nnx.Module):
    """Compresses fused tokens to normed latents; without "latent" it only norms them."""

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

    Tokens are [B, Q, T, D] and the memory is [B, M, R]: every position of every prompt of an
    example is one more query to the same memory.
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
        # With a memory of full width this is plain attention.
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

    def __call__(
        self, h, memory: Memory, *, key: PRNGKeyArray | None = None, weights: bool = False
    ) -> tuple[Float[Array, "B Q T D"], Float[Array, "B N Q T M"] | None]:
        """The new tokens, and with `weights` the attention weights of the memory (else None)."""
        keys = split(key, 2)
        h = h + dropout(self.attention(self.norms[0](h)), self.dropout, keys[0])
        queries, mask = self._memory_queries(h, memory)
        h = self._memory_and_mlp(h, memory, keys[1], absorbed=False)
        if not weights:
            return h, None
        found = self.memory_attention.weights(queries, memory.c_mem, mask)
        return h, found.reshape(*found.shape[:2], *h.shape[1:3], -1)

    def prefill(self, h, cache: LayerCache, memory: Memory, lengths):
        a, cache = self.attention.prefill(self.norms[0](h), cache, lengths)
        return self._memory_and_mlp(h + a, memory, None, absorbed=False), cache

    def decode_step(self, h, cache: LayerCache, memory: Memory):
        a, cache = self.attention.decode_step(self.norms[0](h), cache)
        return self._memory_and_mlp(h + a, memory, None, absorbed=True), cache

    def _memory_queries(self, h, memory: Memory):
        """All positions of all prompts of an example [B, QT, D], and the mask [B, 1, M]."""
        batch, prompts, length, dim = h.shape
        mask = None if memory.mask is None else memory.mask[:, None, :]
        return self.norms[1](h).reshape(batch, prompts * length, dim), mask

    def _memory_and_mlp(self, h, memory, key, *, absorbed):
        """The memory attention and the MLP."""
        keys = split(key, 2)
        queries, mask = self._memory_queries(h, memory)
        read = self.memory_attention(queries, memory.c_mem, mask, absorbed=absorbed)
        h = h + dropout(read.reshape(h.shape), self.dropout, keys[0])
        return h + dropout(self.mlp(self.norms[2](h)), self.dropout, keys[1])


class Decoder(nnx.Module):
    """The layers and the final norm, from embedded tokens to the states that the head reads."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        self.dropout, self.remat = config.dropout, config.remat
        self.layers = nnx.List(
            [DecoderLayer(config, rngs=rngs) for _ in range(config.num_decoder_layers)]
        )
        self.norm = RMSNorm(config.embed_dim, param_dtype=config.dtypes["param_dtype"])

    def __call__(
        self,
        h: Float[Array, "B Q T D"],
        memory: Memory,
        *,
        key: PRNGKeyArray | None = None,
        weights: bool = False,
    ) -> tuple[Float[Array, "B Q T D"], Float[Array, "B layers N Q T M"] | None]:
        """The states, and with `weights` the attention weights of the memory (else None)."""
        keys, layer_weights = split(key, len(self.layers) + 1), []
        h = dropout(h, self.dropout, keys[-1])
        for layer, layer_key in zip(self.layers, keys, strict=False):
            call = functools.partial(layer, weights=weights)
            h, memory_weights = remat(call, self.remat)(h, memory, key=layer_key)
            h = constrain(h, ("batch",))
            layer_weights.append(memory_weights)
        return self.norm(h), jnp.stack(layer_weights, axis=1) if weights else None

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
