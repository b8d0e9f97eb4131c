"""SLAM v3 as a whole: `encode` makes the memory of some inputs, `decode` answers from it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slam_jax.array_typing import AnyArray
from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import DropoutKey, dropout, split
from slam_jax.layers.embedding import Embedding
from slam_jax.layers.kv_cache import check_appended, check_prompts
from slam_jax.layers.linear import Linear
from slam_jax.layers.lora import add_lora
from slam_jax.layers.masks import prefix_mask, without_unknown_pads
from slam_jax.layers.precision import precise
from slam_jax.protocol import Hidden, Output
from slam_jax.slam_v3.alignment import AlignmentHead
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.decoder import Decoder, Memory, MemoryCompressor
from slam_jax.slam_v3.fusion import Fusion
from slam_jax.slam_v3.language_decoder import LanguageModelDecoder
from slam_jax.slam_v3.processes import JointBlock, ParallelProcesses
from slam_jax.slam_v3.streams import Inputs, Stream, Streams, check_inputs


class Attention(NamedTuple):
    """Attention weights of one forward pass. They sum to 1 over the last axis, or are 0 where a
    token may attend to nothing. S are the tokens of the streams in the order text, image, aux.

    processes: of the shared attention; None without it. memory: how much of each token each memory
    token has read; the identity without a bottleneck. decoder: of the memory attention.
    """

    processes: Float[Array, "P B layers N S S"] | None
    memory: Float[Array, "B M S"]
    decoder: Float[Array, "B layers N *Q T M"]


class SlamV3(nnx.Module):
    """The whole model. A pytree: jit, grad and vmap take it as an argument.

        memory = model.encode(Inputs(image=image))
        logits = model.decode(tokens, memory)

    Tokens are [B, *Q, T]: an example may have any number of prompts, or a single one [B, T], and
    all of them read the one memory of their example.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        self.config = config
        # One table for text that is read and tokens that are written: the "red" of a question
        # matches the "red" of a scene. The head has its own parameters. A language model as the
        # decoder has both.
        own, normal = config.language_model is None, nnx.initializers.normal(0.02)
        sizes = (config.vocab_size, config.embed_dim)
        self.embedding = Embedding(*sizes, embedding_init=normal, **kw) if own else None
        self.streams = Streams(config, rngs=rngs)
        # Checkpoints know the joint block as level_one and the compressor as memory_bank.
        self.level_one = JointBlock(config, rngs=rngs)
        self.processes = ParallelProcesses(config, rngs=rngs)
        self.fusion = Fusion(config, rngs=rngs)
        self.memory_bank = MemoryCompressor(config, rngs=rngs)
        self.decoder: Any = (Decoder if own else LanguageModelDecoder)(config, rngs=rngs)
        self.head = Linear(*sizes[::-1], **kw) if own else None
        self.alignment = AlignmentHead(config, rngs=rngs)
        if config.lora.rank:  # last, so that all other parameters start as they do without
            add_lora(self, config.lora.rank, config.lora.alpha, config.lora.patterns, rngs)

    @precise
    def encode(self, inputs: Inputs, *, key: DropoutKey = None) -> Memory:
        """The memory that the decoder attends to. `key`: of dropout.

        Raises InputError where there is no input, or one does not have the form of `Inputs`.
        """
        return self._encode(inputs, key)[0]

    @precise
    def decode(
        self, tokens: Int[AnyArray, "B *Q T"], memory: Memory, *, key: DropoutKey = None
    ) -> Float[Array, "B *Q T V"]:
        """Next-token logits (float32 or wider) at every position; right pads change no others.

        This is the forward pass over given tokens; `slam_jax.generation` generates new ones.
        """
        return self.logits(self._decode(tokens, memory, key)[0])

    @precise
    def decode_hidden(
        self, tokens: Int[AnyArray, "B *Q T"], memory: Memory
    ) -> Float[Array, "B *Q T D"]:
        """`decode` without the head: `logits` takes these states, or a part of them."""
        return self._decode(tokens, memory, None)[0]

    def __call__(
        self,
        tokens: Int[AnyArray, "B *Q T"],
        inputs: Inputs,
        *,
        key: DropoutKey = None,
        attention: bool = False,
    ) -> Output:
        """Encodes, then decodes. `attention`: the output also has the attention weights."""
        hidden = self.hidden(tokens, inputs, key=key, attention=attention)
        return Output(self.logits(hidden.states), attention=hidden.attention)

    @precise
    def hidden(
        self,
        tokens: Int[AnyArray, "B *Q T"],
        inputs: Inputs,
        *,
        key: DropoutKey = None,
        attention: bool = False,
    ) -> Hidden:
        """The forward pass without the head; the same arguments as `__call__`."""
        key_encode, key_decode = split(key, 2)
        memory, of_processes, of_memory = self._encode(inputs, key_encode, attention)
        states, of_decoder = self._decode(tokens, memory, key_decode, attention)
        if of_memory is None or of_decoder is None:  # not asked for
            return Hidden(states)
        of_decoder = of_decoder.reshape(*of_decoder.shape[:3], *tokens.shape[1:], -1)
        return Hidden(states, attention=Attention(of_processes, of_memory, of_decoder))

    @precise
    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The head: logits (float32 or wider) of hidden states."""
        if self.head is None:
            return self.decoder.logits(states)
        return self.head.logits(states)

    @precise
    def run_processes(
        self, inputs: Inputs, *, key: DropoutKey = None, attention: bool = False
    ) -> tuple[Float[Array, "P B S D"], list[Stream], Any]:
        """The outputs y_p of the processes, the streams that they read, and the weights of their
        shared attention [P, B, layers, N, S, S] if asked for, else None."""
        return self._run_processes(inputs, split(key, 3), attention)

    @precise
    def fuse(
        self, y: Float[Array, "P B S D"], streams: Sequence[Stream], *, key: DropoutKey = None
    ) -> Memory:
        """The memory of the outputs of the processes; the rest of `encode`."""
        fused = self.fusion(y, streams, key=key)
        return self.memory_bank(fused.tokens, fused.mask)

    @precise
    def embed(self, inputs: Inputs, *, key: DropoutKey = None) -> Float[Array, "B embed"]:
        """A unit vector for retrieval; give one input alone (see `AlignmentHead`)."""
        return self.alignment(self.encode(inputs, key=key))

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Any:
        """An empty cache for rows of `batch_shape` (B, *Q) and at most `max_length` tokens each: a
        `DecoderCache`, or that of the language model which is the decoder."""
        return self.decoder.init_cache(_rows(batch_shape), max_length)

    @precise
    def prefill(
        self,
        tokens: Int[AnyArray, "B *Q T"],
        cache: Any,
        memory: Memory,
        *,
        lengths: Int[AnyArray, "B *Q"] | None = None,
        append: bool = False,
    ) -> tuple[Float[Array, "B *Q T V"], Any]:
        """`decode`, and this empty cache filled; `lengths`: the number of real tokens of each row.

        append: a static bool; the tokens follow those that the cache stores. Logits and cache are
        those of one prefill of all tokens with the same memory.

        Raises InputError as `check_prompts` or `check_appended` does.
        """
        real = None
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            real = prefix_mask(lengths, tokens.shape[-1])
            lengths = lengths.reshape(_rows(lengths.shape))
        if append:
            room = self.decoder.room(cache)
            check_appended(lengths, self.decoder.stored(cache), tokens.shape[-1], room)
        elif self.head is None:
            check_prompts(lengths, self.decoder.stored(cache), tokens.shape[-1])
        tokens = without_unknown_pads(tokens, real, self.config.vocab_size)
        given = self._decoder_input(tokens)
        h, cache = self.decoder.prefill(given, cache, memory, lengths, append)
        return self.logits(h).reshape(*tokens.shape, self.config.vocab_size), cache

    @precise
    def decode_step(
        self, tokens: Int[AnyArray, "B *Q"], cache: Any, memory: Memory
    ) -> tuple[Float[Array, "B *Q V"], Any]:
        """The logits after one more token per row, computed on the latents (absorbed form).

        Raises InputError where a row of the cache is full; under `jax.jit` see `LatentCache`.
        """
        given = self._decoder_input(tokens[..., None])
        h, cache = self.decoder.decode_step(given, cache, memory)
        return self.logits(h).reshape(*tokens.shape, self.config.vocab_size), cache

    def _encode(self, inputs: Inputs, key: DropoutKey, with_weights: bool = False):
        """The memory, and the weights of the processes and of the memory tokens if asked for."""
        *keys, fusion_key = split(key, 4)
        y, streams, weights = self._run_processes(inputs, keys, with_weights)
        fused = self.fusion(y, streams, key=fusion_key, with_weights=with_weights)
        return self.memory_bank(fused.tokens, fused.mask), weights, fused.weights

    def _run_processes(self, inputs: Inputs, keys: Sequence[DropoutKey], with_weights: bool):
        streams, bank = self.level_one(self._streams(inputs, keys[0]), key=keys[1])
        y, weights = self.processes(streams, bank, key=keys[2], with_weights=with_weights)
        return y, streams, weights

    def _streams(self, inputs: Inputs, key: DropoutKey) -> list[Stream]:
        check_inputs(inputs)
        inputs = jax.tree.map(jnp.asarray, inputs)
        text = inputs.text
        if text is not None:
            text = without_unknown_pads(text, inputs.text_mask, self.config.vocab_size)
            text = self._embed(text)
        streams, rate = self.streams(inputs, text), self.config.dropout
        keys = split(key, 3)[: len(streams)]  # there are at most three streams
        return [
            stream._replace(tokens=constrain(dropout(stream.tokens, rate, stream_key), ("batch",)))
            for stream, stream_key in zip(streams, keys, strict=True)
        ]

    def _decode(self, tokens, memory: Memory, key: DropoutKey, with_weights: bool = False):
        """The states [B, *Q, T, D], and the weights of the memory attention if asked for."""
        h = self._decoder_input(tokens)
        h, weights = self.decoder(h, memory, key=key, with_weights=with_weights)
        return h.reshape(*tokens.shape, h.shape[-1]), weights

    def _decoder_input(self, tokens: Int[AnyArray, "B *Q T"]) -> jax.Array:
        """Embedded tokens [B, Q, T, D] for our own decoder; a language model reads tokens."""
        rows = jnp.asarray(tokens).reshape(*_rows(tokens.shape[:-1]), tokens.shape[-1])
        return rows if self.head is None else self._embed(rows)

    def _embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T L"]:
        return self.decoder.embed(tokens) if self.embedding is None else self.embedding(tokens)


def _rows(batch_shape: tuple[int, ...]) -> tuple[int, int]:
    """[B, *Q] as the decoder has it: B and the number of prompts an example."""
    return batch_shape[0], math.prod(batch_shape[1:])
