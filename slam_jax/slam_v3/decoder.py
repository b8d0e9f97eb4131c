"""The decoder: causal latent attention to the text so far, and latent attention to the memory.

The memory is all that it knows of the inputs. It has nothing to do with the bank, which encoder
processes read.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import DropoutKey, dropout, split
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.kv_cache import KVCache, is_ring
from slam_jax.layers.latent_attention import (
    LatentCache,
    LatentCrossAttention,
    MultiHeadLatentAttention,
)
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.rotary import Rope
from slam_jax.layers.stacked import equal_layers, kinds, run_layers
from slam_jax.slam_v3.config import SlamV3Config

# One cache per layer and not a stack, so that a decoding step updates each in place. A `KVCache`
# where `config.without` has "latent".
LayerCache = LatentCache | KVCache
DecoderCache = tuple[LayerCache, ...]


@struct.dataclass
class Memory:
    """The result of one encode: one latent per memory token.

    All decoder layers, questions and samples read it. mask: True = present, None = all present.
    """

    c_mem: Float[Array, "B M R"]
    mask: Bool[Array, "B M"] | None = None


class MemoryCompressor(nnx.Module):
    """Compresses memory tokens to normed latents; without "latent" it only norms them."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, rank, param_dtype = config.embed_dim, config.kv_lora_rank, kw["param_dtype"]
        self.norm_in = RMSNorm(dim, param_dtype=param_dtype)
        self.compresses = config.has("latent")
        if self.compresses:
            self.down = Linear(dim, rank, **kw)
            self.norm = RMSNorm(rank, param_dtype=param_dtype)

    def __call__(self, tokens: Float[Array, "B M D"], mask: Bool[Array, "B M"] | None) -> Memory:
        c_mem = self.norm_in(tokens)
        return Memory(self.norm(self.down(c_mem)) if self.compresses else c_mem, mask)


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
            sizes = {**widths, **config.sizes("kv_lora_rank", "q_lora_rank", "window")}
            self.attention = MultiHeadLatentAttention(
                dim, config.num_heads, **sizes, out_scale=scale, **kw
            )
        else:
            self.attention = GroupedQueryAttention(
                dim, config.num_heads, rope=Rope(), out_scale=scale, **kw
            )
        # With a memory of full width this is plain attention.
        heads = dict(qk_head_dim=widths["qk_nope_head_dim"], v_head_dim=widths["v_head_dim"])
        self.memory_attention = LatentCrossAttention(
            dim, config.num_heads, kv_lora_rank=config.memory_dim, **heads, out_scale=scale, **kw
        )
        self.mlp = GatedMLP(dim, config.mlp_dim, out_scale=scale, **kw)

    def __call__(
        self, h, memory: Memory, *, key: DropoutKey = None, with_weights: bool = False
    ) -> tuple[Float[Array, "B Q T D"], Float[Array, "B N Q T M"] | None]:
        """The new tokens, and the weights of the memory attention if asked for, else None."""
        keys = split(key, 2)
        h = h + dropout(self.attention(self.norms[0](h)), self.dropout, keys[0])
        return self._memory_and_mlp(h, memory, keys[1], with_weights=with_weights)

    def prefill(self, h, cache: LayerCache, memory: Memory, lengths, append: bool = False):
        read = self.attention.append if append else self.attention.prefill
        a, cache = read(self.norms[0](h), cache, lengths)
        return self._memory_and_mlp(h + a, memory)[0], cache

    def decode_step(self, h, cache: LayerCache, memory: Memory):
        a, cache = self.attention.decode_step(self.norms[0](h), cache)
        return self._memory_and_mlp(h + a, memory, absorbed=True)[0], cache

    def _memory_and_mlp(
        self, h, memory, key=None, *, absorbed: bool = False, with_weights: bool = False
    ):
        """The memory attention and the MLP."""
        keys, (batch, prompts, length, dim) = split(key, 2), h.shape
        x = self.norms[1](h).reshape(batch, prompts * length, dim)
        mask, weights = None if memory.mask is None else memory.mask[:, None, :], None
        if with_weights:
            weights = self.memory_attention.weights(x, memory.c_mem, mask)
            weights = weights.reshape(*weights.shape[:2], prompts, length, weights.shape[-1])
        read = self.memory_attention(x, memory.c_mem, mask, absorbed=absorbed)
        h = h + dropout(read.reshape(h.shape), self.dropout, keys[0])
        return h + dropout(self.mlp(self.norms[2](h)), self.dropout, keys[1]), weights


class Decoder(nnx.Module):
    """The layers and the final norm, from embedded tokens to the states that the head reads."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        self.dropout, self.remat = config.dropout, config.remat
        count, layer = config.num_decoder_layers, functools.partial(DecoderLayer, config)
        self.layers = equal_layers(config.scan_layers, count, layer, rngs=rngs)
        norm: Any = dict(param_dtype=config.dtypes["param_dtype"])
        self.norm = RMSNorm(config.embed_dim, **norm)
        self.input_norm = RMSNorm(config.embed_dim, **norm) if config.decoder_input_norm else None

    def __call__(
        self,
        h: Float[Array, "B Q T D"],
        memory: Memory,
        *,
        key: DropoutKey = None,
        with_weights: bool = False,
    ) -> tuple[Float[Array, "B Q T D"], Float[Array, "B layers N Q T M"] | None]:
        """The states, and the weights of the memory attention if asked for, else None."""
        *layer_keys, input_key = split(key, len(self.layers) + 1)
        h = dropout(self._norm_input(h), self.dropout, input_key)

        def call(layer: DecoderLayer, h: Any, key: DropoutKey) -> tuple[Any, Any]:
            h, weights = layer(h, memory, key=key, with_weights=with_weights)
            return constrain(h, ("batch",)), weights

        h, found = run_layers(call, self.layers, h, layer_keys, policy=self.remat)
        return self.norm(h), jnp.stack(found, axis=1) if with_weights else None

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> DecoderCache:
        layers = kinds(self.layers)
        return tuple(layer.attention.init_cache(batch_shape, max_length) for layer in layers)

    def prefill(
        self,
        h: Float[Array, "B Q T D"],
        cache: DecoderCache,
        memory: Memory,
        lengths: Int[Array, "B Q"] | None,
        append: bool = False,
    ) -> tuple[Float[Array, "B Q T D"], DecoderCache]:
        """The states of the prompts, and the cache with them. It must be empty, unless `append`:
        then they follow the tokens that it stores."""
        return self._cached(lambda layer, *x: layer.prefill(*x, memory, lengths, append), h, cache)

    def stored(self, cache: DecoderCache) -> Int[Array, "B Q"]:
        """The tokens that each row of the cache stores."""
        return cache[0].length

    def room(self, cache: DecoderCache) -> int | None:
        """The most tokens that a row of the cache may have, None = any number."""
        window, capacity = kinds(self.layers)[0].attention.window, cache[0].capacity
        return None if is_ring(capacity, window) else capacity

    def decode_step(
        self, h: Float[Array, "B Q 1 D"], cache: DecoderCache, memory: Memory
    ) -> tuple[Float[Array, "B Q 1 D"], DecoderCache]:
        return self._cached(lambda layer, *x: layer.decode_step(*x, memory), h, cache, unroll=True)

    def _cached(self, run, h, cache, *, unroll: bool = False):
        """Runs all layers; `run(layer, h, layer_cache)` returns the new states and cache of one."""
        h, new = run_layers(run, self.layers, self._norm_input(h), cache, unroll=unroll)
        return self.norm(h), tuple(new)

    def _norm_input(self, h):
        return h if self.input_norm is None else self.input_norm(h)
