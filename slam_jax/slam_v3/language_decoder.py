"""A published language model as the decoder, with attention to the memory between its blocks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.dropout import DropoutKey
from slam_jax.layers.latent_attention import LatentCrossAttention
from slam_jax.layers.norms import RMSNorm
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.decoder import Memory


class GatedMemoryAttention(nnx.Module):
    """h + tanh(gate) * attention(norm(h), memory), with a gate that starts at 0.

    So a new one changes nothing. Source: Alayrac et al. 2022, "Flamingo" (arXiv 2204.14198),
    section 2.2; without its gated MLP.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim = config.language_model.embed_dim
        num_heads = getattr(config.language_model, "num_heads", config.num_heads)
        width = max(2, dim // num_heads)
        self.norm = RMSNorm(dim, param_dtype=kw["param_dtype"])
        sizes: Any = dict(kv_lora_rank=config.memory_dim, qk_head_dim=width, v_head_dim=width)
        self.attention = LatentCrossAttention(dim, num_heads, **sizes, **kw)
        self.gate = nnx.Param(jnp.zeros((), kw["param_dtype"]))

    def __call__(
        self,
        h: Float[Array, "B Q T L"],
        memory: Memory,
        *,
        absorbed: bool = False,
        with_weights: bool = False,
    ) -> tuple[Float[Array, "B Q T L"], Float[Array, "B N Q T M"] | None]:
        """The new tokens, and the attention weights if asked for, else None."""
        batch, prompts, length, dim = h.shape
        x = self.norm(h).reshape(batch, prompts * length, dim)
        mask, weights = _visible(memory), None
        if with_weights:
            weights = self.attention.weights(x, memory.c_mem, mask)
            weights = weights.reshape(*weights.shape[:2], prompts, length, weights.shape[-1])
        read = self.attention(x, memory.c_mem, mask, absorbed=absorbed).reshape(h.shape)
        return h + jnp.tanh(self.gate[...]).astype(h.dtype) * read, weights


class LanguageModelDecoder(nnx.Module):
    """The interface of `Decoder` for a language model; it reads tokens, not embedded ones.

    At the first step of a training its logits are those of the language model, since all gates are
    0. Its cache is that of the language model, such as the latents of DeepSeek's attention.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        from slam_jax.language_models import make_model  # they import this package

        self.language_model = make_model(config.language_model, rngs=rngs)
        self.every = config.decoder.memory_every
        count = -(-len(self.language_model.blocks) // self.every)
        self.readers = nnx.List([GatedMemoryAttention(config, rngs=rngs) for _ in range(count)])

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T L"]:
        """The embeddings that the text stream reads."""
        return self.language_model.embedding(tokens)

    def logits(self, states: Float[Array, "*B L"]) -> Float[Array, "*B V"]:
        return self.language_model.logits(states)

    def __call__(
        self,
        tokens: Int[Array, "B Q T"],
        memory: Memory,
        *,
        key: DropoutKey = None,
        with_weights: bool = False,
    ) -> tuple[Float[Array, "B Q T L"], Float[Array, "B layers N Q T M"] | None]:
        """The states, and the weights of the memory attention if asked for, else None.

        key: not used, since published language models are fine-tuned without dropout.
        """
        found: list[Any] = []
        read = self._reading(memory, found if with_weights else None)
        hidden = self.language_model.states(tokens, read)
        return hidden.states, jnp.stack(found, axis=1) if with_weights else None

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Any:
        return self.language_model.init_cache(batch_shape, max_length)

    def stored(self, cache: Any) -> Int[Array, "B Q"]:
        """The tokens that each row of the cache stores."""
        return cache.length

    def room(self, cache: Any) -> int | None:
        """The most tokens that a row of the cache may have, None = any number."""
        return self.language_model.room(cache)

    def prefill(
        self,
        tokens: Int[Array, "B Q T"],
        cache: Any,
        memory: Memory,
        lengths: Int[Array, "B Q"] | None,
        append: bool = False,
    ) -> tuple[Float[Array, "B Q T L"], Any]:
        before = self._reading(memory)
        return self.language_model.prefill_states(
            tokens, cache, before, lengths=lengths, append=append
        )

    def decode_step(
        self, tokens: Int[Array, "B Q 1"], cache: Any, memory: Memory
    ) -> tuple[Float[Array, "B Q 1 L"], Any]:
        before = self._reading(memory, absorbed=True)
        return self.language_model.decode_states(tokens, cache, before)

    def _reading(
        self, memory: Memory, found: list[Any] | None = None, *, absorbed: bool = False
    ) -> Callable[[int, Any], Any]:
        """What comes before each block: (index, tokens) -> tokens. Weights are added to `found`."""

        def read(index: int, h: Float[Array, "B Q T L"]) -> Float[Array, "B Q T L"]:
            if index % self.every:
                return h
            reader = self.readers[index // self.every]
            h, weights = reader(h, memory, absorbed=absorbed, with_weights=found is not None)
            if found is not None:
                found.append(weights)
            return h

        return read


def _visible(memory: Memory) -> Bool[Array, "B 1 M"] | None:
    return None if memory.mask is None else memory.mask[:, None, :]
