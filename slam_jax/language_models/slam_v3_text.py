"""SLAM v3 with the text stream alone, as a language model.

The encoder is not causal, so it may only read past tokens. The text is cut into windows of W
tokens, counted from its start. While the decoder writes one window, its memory is the encoder's
output for the window before; the first window has no memory. A token thus sees its own window up to
itself and the whole window before, W + 1 to 2 W tokens, and nothing earlier, while the other
systems see everything. In return its cache does not grow.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from slam_jax.errors import InputError, require
from slam_jax.language_models.base import HeadedModel
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.embedding import Embedding
from slam_jax.layers.flops import linear
from slam_jax.layers.kv_cache import new_positions
from slam_jax.layers.linear import Linear
from slam_jax.layers.norms import RMSNorm
from slam_jax.protocol import Hidden
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.decoder import Decoder, DecoderCache, Memory, MemoryCompressor
from slam_jax.slam_v3.flops import decode_flops, encode_flops
from slam_jax.slam_v3.fusion import Fusion
from slam_jax.slam_v3.processes import JointBlock, ParallelProcesses
from slam_jax.slam_v3.streams import Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlamV3TextConfig(LanguageModelConfig):
    """text_window: W. The other fields: see `SlamV3Config`."""

    mlp_dim: int
    num_heads: int
    text_window: int = 64
    num_processes: int = 4
    num_process_layers: int = 1
    num_decoder_layers: int = 4
    kv_lora_rank: int = 128
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(not self.tie_embeddings, "tie_embeddings", True, "False: the head is its own")
        fixed = "1e-06, that of SLAM v3's norms"
        require(self.norm_epsilon == 1e-6, "norm_epsilon", self.norm_epsilon, fixed)
        _ = self.slam_v3  # checks the other fields

    @property
    def slam_v3(self) -> SlamV3Config:
        """The configuration of SLAM v3's modules."""
        own = ("text_window", "norm_epsilon", "tie_embeddings")
        names = [field.name for field in dataclasses.fields(self) if field.name not in own]
        # With one stream alone there is no other to read.
        return SlamV3Config(**self.sizes(*names), without=("cross_modal",))

    def body_flops(self, num_tokens: int) -> int:
        v3, window = self.slam_v3, self.text_window
        # The last window is not encoded. A window that is not full costs as much as a full one.
        count = -(-num_tokens // window)
        decoder = decode_flops(v3, prompts=1, length=window, memory=window)
        decoder -= linear(window, self.embed_dim, self.vocab_size)  # the body has no head
        return (count - 1) * encode_flops(v3, text=window) + count * decoder


@struct.dataclass
class TextCache:
    """The cache of each row; the axes of the batch are flattened to rows.

    c_mem: the memory made from the window before, which is valid once `length` is at least W.
    window: the tokens of the current window so far. decoder: its latents. length: tokens seen in
    all.
    """

    c_mem: Float[Array, "rows W R"]
    window: Int[Array, "rows W"]
    decoder: DecoderCache
    length: Int[Array, "rows"]


class SlamV3Text(HeadedModel):
    """The modules of SLAM v3 for text, with the protocol of a language model."""

    def __init__(self, config: SlamV3TextConfig, *, rngs: nnx.Rngs):
        self.config, v3, normal = config, config.slam_v3, nnx.initializers.normal
        kw: Any = dict(**config.dtypes, rngs=rngs)
        sizes = (config.vocab_size, config.embed_dim)
        self.embedding = Embedding(*sizes, embedding_init=normal(0.02), **kw)
        self.text_norm = RMSNorm(config.embed_dim, param_dtype=kw["param_dtype"])
        # `Streams` says why its standard deviation is so large.
        self.type = nnx.Param(normal(0.5)(rngs.params(), (config.embed_dim,), kw["param_dtype"]))
        # Checkpoints know the joint block as level_one and the compressor as memory_bank.
        self.level_one = JointBlock(v3, rngs=rngs)
        self.processes = ParallelProcesses(v3, rngs=rngs)
        self.fusion = Fusion(v3, rngs=rngs)
        self.memory_bank = MemoryCompressor(v3, rngs=rngs)
        self.decoder = Decoder(v3, rngs=rngs)
        self.head = Linear(config.embed_dim, config.vocab_size, **kw)

    def _hidden(self, tokens, mask, segment_ids, key) -> Hidden:
        if segment_ids is not None:
            raise InputError(
                "segment_ids for slam_v3_text, which encodes whole windows of a row; expected one "
                "text a row"
            )
        rows, back = tokens.reshape(-1, tokens.shape[-1]), None
        if mask is not None:
            # Windows begin at the first real token: pads are moved to the right, and back later.
            order = jnp.argsort(~mask.reshape(rows.shape), axis=-1)
            rows, back = jnp.take_along_axis(rows, order, axis=-1), jnp.argsort(order, axis=-1)
        windows, keys = self._windows(rows), split(key, 2)
        memory = self._memory(self._encode(windows[:, :-1], keys[0]))
        h, _ = self.decoder(self._embed(windows), memory, key=keys[1])
        h = _joined(h, rows)
        if back is not None:
            h = jnp.take_along_axis(h, back[..., None], axis=1)
        return Hidden(h.reshape(*tokens.shape, -1))

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> TextCache:
        """An empty cache; it takes any number of tokens, whatever `max_length`."""
        rows, window = math.prod(batch_shape), self.config.text_window
        return TextCache(
            c_mem=jnp.zeros((rows, window, self.config.kv_lora_rank), self.config.dtypes["dtype"]),
            window=jnp.zeros((rows, window), jnp.int32),
            decoder=self.decoder.init_cache((rows, 1), window),
            length=jnp.zeros((rows,), jnp.int32),
        )

    def _prefill(self, tokens, cache: TextCache, lengths, mask, append) -> tuple[Any, TextCache]:
        """With `append` the decoder reads the tokens of the current window once more."""
        num_tokens, size = tokens.shape[-1], self.config.text_window
        rows, row = tokens.reshape(-1, num_tokens), jnp.arange(cache.length.size)
        length = jnp.full_like(cache.length, num_tokens) if lengths is None else lengths.reshape(-1)
        place = jnp.zeros_like(length)  # of the first new token in the first window
        if append:
            place = cache.length % size
            rows = _after(cache.window, place, rows)
        windows, ends = self._windows(rows), place + length
        count = windows.shape[1]
        c_mem = self._encode(windows, None)
        h, decoder = self.decoder.prefill(
            self._embed(windows),
            self.decoder.init_cache((len(rows) * count, 1), size),
            self._memory(c_mem[:, :-1], cache if append else None),
            None,
        )
        # The window of each row's next token; it is empty where the last one is full.
        current = ends // size
        last = jnp.minimum(current, count - 1)
        decoder = jax.tree.map(lambda x: x[row * count + last], decoder)
        before = c_mem[row, jnp.maximum(current - 1, 0)]
        c_mem = jnp.where((current > 0)[:, None, None], before, cache.c_mem)
        h = _joined(h, rows)
        if append:
            h = jnp.take_along_axis(h, new_positions(place, num_tokens)[..., None], axis=1)
        logits = self.logits(h).reshape(*tokens.shape, -1)
        window = windows[row, last].astype(jnp.int32)
        length = cache.length + length if append else length
        return logits, self._cache(c_mem, window, decoder, length)

    def _decode_step(self, tokens, cache: TextCache) -> tuple[jax.Array, TextCache]:
        """A row whose window is full after this token encodes it and begins the next one."""
        size, rows = self.config.text_window, tokens.reshape(-1)
        known = jnp.broadcast_to(cache.length[:, None] >= size, cache.window.shape)
        embedded = self._embed(rows[:, None, None])
        before = Memory(cache.c_mem, known)
        h, decoder = self.decoder.decode_step(embedded, cache.decoder, before)
        place = cache.length % size
        window = cache.window.at[jnp.arange(len(rows)), place].set(rows.astype(jnp.int32))
        full = (place == size - 1)[:, None, None]
        c_mem = jax.lax.cond(
            jnp.any(full),
            lambda: jnp.where(full, self._encode(window[:, None], None)[:, 0], cache.c_mem),
            lambda: cache.c_mem,
        )
        logits = self.logits(h).reshape(*tokens.shape, -1)
        return logits, self._cache(c_mem, window, decoder, cache.length + 1)

    def _cache(self, c_mem, window, decoder: DecoderCache, length) -> TextCache:
        """The cache after `length` tokens, where the decoder knows those of the current window."""
        known = (length % self.config.text_window)[:, None]
        decoder = tuple(dataclasses.replace(layer, length=known) for layer in decoder)
        return TextCache(c_mem, window, decoder, length)

    def _windows(self, rows: Int[Array, "rows T"]) -> Int[Array, "rows windows W"]:
        """Whole windows, the last one padded with token 0."""
        size = self.config.text_window
        count = -(-rows.shape[1] // size)
        rows = jnp.pad(rows, [(0, 0), (0, count * size - rows.shape[1])])
        return rows.reshape(len(rows), count, size)

    def _embed(self, windows: Int[Array, "rows windows W"]) -> Float[Array, "rows_windows 1 W D"]:
        """The embeddings in the shape of the decoder: each window is an example with one prompt."""
        return self.embedding(windows.reshape(-1, 1, windows.shape[-1]))

    def _encode(
        self, windows: Int[Array, "rows windows W"], key: PRNGKeyArray | None
    ) -> Float[Array, "rows windows W R"]:
        """The memory that each window gives to the next."""
        keys = split(key, 4)
        x = self.text_norm(self.embedding(windows.reshape(-1, windows.shape[-1])))
        x = dropout(x + self.type[None, None].astype(x.dtype), self.config.dropout, keys[0])
        streams, bank = self.level_one([Stream(x, None, jnp.arange(x.shape[1]))], key=keys[1])
        y, _ = self.processes(streams, bank, key=keys[2])
        fused = self.fusion(y, streams, key=keys[3])
        c_mem = self.memory_bank(fused.tokens, fused.mask).c_mem
        return c_mem.reshape(*windows.shape, self.config.kv_lora_rank)

    def _memory(
        self, c_mem: Float[Array, "rows windows W R"], cache: TextCache | None = None
    ) -> Memory:
        """The memories of windows 0 .. m, from windows 0 .. m - 1; the first one is that of the
        cache, or empty."""
        c_mem = jnp.pad(c_mem, [(0, 0), (1, 0), (0, 0), (0, 0)])
        mask = jnp.broadcast_to(jnp.arange(c_mem.shape[1])[:, None] > 0, c_mem.shape[:3])
        if cache is not None:
            c_mem = c_mem.at[:, 0].set(cache.c_mem)
            mask = mask.at[:, 0].set((cache.length >= self.config.text_window)[:, None])
        return Memory(c_mem.reshape(-1, *c_mem.shape[2:]), mask.reshape(-1, c_mem.shape[2]))


def _joined(x: Float[Array, "rows_windows 1 W C"], rows: Any) -> Float[Array, "rows T C"]:
    """The windows of each row one after the other, without the pads of the last one."""
    return x.reshape(len(rows), -1, x.shape[-1])[:, : rows.shape[1]]


def _after(
    window: Int[Array, "rows W"], place: Int[Array, "rows"], rows: Int[Array, "rows T"]
) -> Int[Array, "rows U"]:
    """The first `place` < W tokens of each window, and then those of the row; U = W - 1 + T."""
    size, count = window.shape[1], window.shape[1] - 1 + rows.shape[1]
    at, place = jnp.arange(count)[None], place[:, None]
    index = jnp.where(at < place, at, at - place + size)
    both = jnp.concatenate([window.astype(rows.dtype), rows], axis=1)
    return jnp.take_along_axis(both, index, axis=1, mode="clip")
