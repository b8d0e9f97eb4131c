"""SLAM v3: four parallel encoder processes over any mix of inputs, one memory, one decoder."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray
from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.linear import Linear, project_to_float32
from slam_jax.layers.masks import without_unknown_pads
from slam_jax.protocol import Hidden, Output
from slam_jax.slam_v3.alignment import AlignmentHead
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.decoder import Decoder, DecoderCache, Memory, MemoryBank
from slam_jax.slam_v3.fusion import Fusion
from slam_jax.slam_v3.processes import LevelOne, ParallelProcesses
from slam_jax.slam_v3.streams import Inputs, Stream, Streams, check_inputs


class Attention(NamedTuple):
    """Shares of attention, each 1 in sum over its last axis, or 0 where there is nothing to see.

    S are the tokens of the streams in the order text, image, aux.

    processes: of each head of each process, in its shared attention. memory: what each memory token
    has read; the unit matrix without a bottleneck. decoder: of each head, in its memory attention.
    """

    processes: Float[Array, "P B layers N S S"]
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
        # Of the text that is read and the tokens written so far: the "red" of a question finds that
        # of a scene. The head, which says what comes next, is its own.
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.embed_dim,
            embedding_init=nnx.initializers.normal(0.02),
            **kw,
        )
        self.streams = Streams(config, rngs=rngs)
        self.level_one = LevelOne(config, rngs=rngs)
        self.processes = ParallelProcesses(config, rngs=rngs)
        self.fusion = Fusion(config, rngs=rngs)
        self.memory_bank = MemoryBank(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.head = Linear(config.embed_dim, config.vocab_size, **kw)
        self.alignment = AlignmentHead(config, rngs=rngs)

    def encode(self, inputs: Inputs, *, key: PRNGKeyArray | None = None) -> Memory:
        """What the decoder may look at. `key`: for dropout, None = none.

        Raises InputError where no input is given, or one is not what `Inputs` says.
        """
        keys = split(key, 4)
        streams, bank = self.level_one(self._streams(inputs, keys[0]), key=keys[1])
        y = self.processes(streams, bank, key=keys[2])
        return self.memory_bank(*self.fusion(y, streams, key=keys[3]))

    def attention(self, tokens: Int[AnyArray, "B *Q T"], inputs: Inputs) -> Attention:
        """What attends to what, for the same arguments as a forward pass; to be looked at."""
        given = self._streams(inputs, None)
        streams, bank = self.level_one(given)
        y = self.processes(streams, bank)
        memory = self.memory_bank(*self.fusion(y, streams))
        decoder = self.decoder.memory_weights(self._embed(tokens), memory)
        return Attention(
            processes=self.processes.shared_weights(streams, bank),
            memory=self.fusion.memory_weights(y, streams),
            decoder=decoder.reshape(*decoder.shape[:3], *tokens.shape[1:], -1),
        )

    def decode(
        self, tokens: Int[AnyArray, "B *Q T"], memory: Memory, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B *Q T V"]:
        """Next-token logits (float32 or wider) at every position; right pads change no others."""
        return self.logits(self._decode(tokens, memory, key))

    def __call__(
        self,
        tokens: Int[AnyArray, "B *Q T"],
        inputs: Inputs,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Encode, then decode."""
        return Output(self.logits(self.hidden(tokens, inputs, key=key).states))

    def hidden(
        self,
        tokens: Int[AnyArray, "B *Q T"],
        inputs: Inputs,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Hidden:
        """What the head makes logits of, for the same arguments as a forward pass."""
        key_encode, key_decode = split(key, 2)
        memory = self.encode(inputs, key=key_encode)
        return Hidden(self._decode(tokens, memory, key_decode))

    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The head: logits (float32 or wider) of hidden states."""
        return project_to_float32(states, self.head.kernel[...])

    def embed(self, inputs: Inputs, *, key: PRNGKeyArray | None = None) -> Float[Array, "B E"]:
        """A unit vector for retrieval; give one input alone (see `AlignmentHead`)."""
        return self.alignment(self.encode(inputs, key=key))

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> DecoderCache:
        """An empty cache for rows of `batch_shape` (B, *Q) and at most `max_length` tokens each."""
        return self.decoder.init_cache(_rows(batch_shape), max_length)

    def prefill(
        self,
        tokens: Int[AnyArray, "B *Q T"],
        cache: DecoderCache,
        memory: Memory,
        *,
        lengths: Int[AnyArray, "B *Q"] | None = None,
    ) -> tuple[Float[Array, "B *Q T V"], DecoderCache]:
        """`decode`, and an empty cache filled; `lengths` are the real tokens of each row.

        Raises InputError as `check_prompts` does.
        """
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            real = jnp.arange(tokens.shape[-1]) < lengths[..., None]
            tokens = without_unknown_pads(tokens, real, self.config.vocab_size)
            lengths = lengths.reshape(_rows(lengths.shape))
        h, cache = self.decoder.prefill(self._embed(tokens), cache, memory, lengths)
        return self.logits(h).reshape(*tokens.shape, self.config.vocab_size), cache

    def decode_step(
        self, tokens: Int[AnyArray, "B *Q"], cache: DecoderCache, memory: Memory
    ) -> tuple[Float[Array, "B *Q V"], DecoderCache]:
        """The logits after one more token per row, straight on the latents (absorbed form)."""
        h, cache = self.decoder.decode_step(self._embed(tokens[..., None]), cache, memory)
        return self.logits(h).reshape(*tokens.shape, self.config.vocab_size), cache

    def _streams(self, inputs: Inputs, key: PRNGKeyArray | None) -> list[Stream]:
        check_inputs(inputs)
        inputs = jax.tree.map(jnp.asarray, inputs)
        text = inputs.text
        if text is not None:
            text = without_unknown_pads(text, inputs.text_mask, self.config.vocab_size)
            text = self.embedding(text)
        streams, rate = [], self.config.dropout
        for stream, stream_key in zip(self.streams(inputs, text), split(key, 3), strict=False):
            tokens = constrain(dropout(stream.tokens, rate, stream_key), ("batch",))
            streams.append(stream._replace(tokens=tokens))
        return streams

    def _decode(
        self, tokens: Int[AnyArray, "B *Q T"], memory: Memory, key: PRNGKeyArray | None
    ) -> Float[Array, "B *Q T D"]:
        h = self.decoder(self._embed(tokens), memory, key=key)
        return h.reshape(*tokens.shape, self.config.embed_dim)

    def _embed(self, tokens: Int[AnyArray, "B *Q T"]) -> Float[Array, "B R T D"]:
        rows = jnp.asarray(tokens).reshape(*_rows(tokens.shape[:-1]), tokens.shape[-1])
        return self.embedding(rows)


def _rows(batch_shape: tuple[int, ...]) -> tuple[int, int]:
    """[B, *Q] as the decoder has it: B and the number of prompts an example."""
    batch, *prompts = batch_shape
    count = 1
    for size in prompts:
        count *= size
    return batch, count
