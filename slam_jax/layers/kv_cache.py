"""The cache of plain attention, and how tokens are written to a cache of fixed capacity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from slam_jax.errors import InputError
from slam_jax.layers.masks import prefix_mask


@struct.dataclass
class KVCache:
    """The keys and values of every token of one layer, right-padded to a capacity T.

    They are stored as [*B, K, T, H], the order in which attention reads them, so that a decoding
    step transposes nothing. `filled` and `extended` take, and `tokens_first` gives, [*B, T, K, H].
    length: number of tokens of each row; entries at and beyond it are never attended to.

    A row is full when its length is T. Outside of `jax.jit`, another token raises InputError. Under
    `jax.jit` no error can be raised: the token is not stored, but counted, so that
    `length > capacity` shows afterwards which rows have lost tokens. In a layer with a window of at
    most T tokens the cache is a ring (see `is_ring`), which is never full.
    """

    k: Float[Array, "*B K T H"]
    v: Float[Array, "*B K T H_v"]
    length: Int[Array, "*B"]

    @classmethod
    def empty(
        cls, batch_shape: tuple[int, ...], max_length: int, num_kv_heads: int, head_dim: int, dtype
    ) -> "KVCache":
        shape = (*batch_shape, num_kv_heads, max_length, head_dim)
        length = jnp.zeros(batch_shape, jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), length)

    @property
    def capacity(self) -> int:
        return self.k.shape[-2]

    def tokens_first(self) -> tuple[Float[Array, "*B T K H"], Float[Array, "*B T K H_v"]]:
        """Keys and values as `attend` takes them; XLA cancels this transpose with its own."""
        return _swapped(self.k), _swapped(self.v)

    def filled(
        self,
        k: Float[Array, "*B t K H"],
        v: Float[Array, "*B t K H_v"],
        lengths: Int[Array, "*B"] | None,
        window: int | None = None,
    ) -> "KVCache":
        """This empty cache with right-padded prompts of `lengths` tokens (None = all t) in it."""
        lengths = None if lengths is None else self._per_head(lengths)
        prompts, length = (_swapped(k), _swapped(v)), self._per_head(self.length)
        return self._written(*write_prompt((self.k, self.v), prompts, length, lengths, window))

    def extended(
        self, k: Float[Array, "*B 1 K H"], v: Float[Array, "*B 1 K H_v"], window: int | None = None
    ) -> "KVCache":
        """This cache with one more token per row. Raises InputError as `write_token` does."""
        tokens, length = (_swapped(k), _swapped(v)), self._per_head(self.length)
        return self._written(*write_token((self.k, self.v), tokens, length, window))

    def _per_head(self, length: Int[Array, "*B"]) -> Int[Array, "*B K"]:
        """The length of each head, which is written like a row of its own."""
        return jnp.broadcast_to(length[..., None], self.k.shape[:-2])

    def _written(self, k, v, length: Int[Array, "*B K"]) -> "KVCache":
        return KVCache(k, v, length[..., 0])


def _swapped(x: Float[Array, "*B T K H"]) -> Float[Array, "*B K T H"]:
    return jnp.swapaxes(x, -2, -3)


def check_prompts(lengths: Any, stored: Any, num_tokens: int) -> None:
    """Raises InputError unless there are tokens, lengths are 1 to `num_tokens` and the cache stores
    no tokens yet.

    lengths: tokens of each prompt, None = all. stored: tokens of each row that the cache holds.
    Only concrete values are checked. Under `jax.jit` neither is known: the caller must see to it.
    """
    if num_tokens < 1:
        raise InputError("prefill of 0 tokens; give at least one a row")
    if lengths is not None and not isinstance(lengths, Tracer):
        wrong = np.asarray(lengths)[(np.asarray(lengths) < 1) | (np.asarray(lengths) > num_tokens)]
        if wrong.size:
            raise InputError(f"a prompt length is {wrong[0]}; expected 1 to {num_tokens:,}")
    if not isinstance(stored, Tracer) and np.any(np.asarray(stored)):
        raise InputError(
            f"prefill into a cache that stores {np.asarray(stored).max():,} tokens; give it an "
            "empty one of init_cache, or add tokens with decode_step"
        )


def check_room(length: Any, room: int) -> None:
    """Raises InputError where a row of `length` tokens has no room for one more.

    Only concrete lengths are checked, as in `check_prompts`.
    """
    if not isinstance(length, Tracer) and np.any(np.asarray(length) >= room):
        raise InputError(
            f"a row of the cache stores {np.asarray(length).max():,} tokens and there is room for "
            f"{room:,}: make it with init_cache(..., max_length={room + 1:,} or more), or stop"
        )


def is_ring(capacity: int, window: int | None) -> bool:
    """Whether a cache of a layer with this window is a ring: token t is stored at t % capacity.

    Only tokens that have left the window are overwritten, so that such a cache is never full.
    """
    return window is not None and window <= capacity


def entries_in_window(
    length: Int[Array, "*B"], capacity: int, window: int | None
) -> Bool[Array, "*B T"]:
    """The entries that the last of `length` tokens attends to: those of its window (None = all)."""
    if window is None or not is_ring(capacity, window):
        return prefix_mask(length, capacity)
    newest = jnp.expand_dims(length - 1, -1)
    age = (newest - jax.lax.broadcast_to_rank(jnp.arange(capacity), newest.ndim)) % capacity
    return age <= jnp.minimum(newest, window - 1)


def write_prompt(
    buffers: tuple,
    prompts: tuple,
    length: Int[Array, "*B"],
    lengths: Int[Array, "*B"] | None,
    window: int | None = None,
) -> tuple:
    """Buffers [*B, T, ..] with prompts [*B, t, ..] at their start, and then the new length.

    window: of the layer; see `is_ring`. A ring takes the last T tokens of each row.

    Raises InputError where t exceeds the capacity T and the buffers are no ring, and as
    `check_prompts` does.
    """
    axis = length.ndim
    num_tokens, capacity = prompts[0].shape[axis], buffers[0].shape[axis]
    check_prompts(lengths, length, num_tokens)
    new = jnp.full(length.shape, num_tokens) if lengths is None else lengths
    new = new.astype(jnp.int32)
    if num_tokens > capacity and is_ring(capacity, window):
        newest = jnp.expand_dims(new - 1, -1)
        slots = jax.lax.broadcast_to_rank(jnp.arange(capacity), newest.ndim)
        tokens = jnp.maximum(newest - (newest - slots) % capacity, 0)
        taken = (
            jnp.take_along_axis(x, jnp.expand_dims(tokens, range(axis + 1, x.ndim)), axis)
            for x in prompts
        )
        return *(x.astype(b.dtype) for b, x in zip(buffers, taken, strict=True)), new
    if num_tokens > capacity:
        raise InputError(
            f"prefill of {num_tokens} tokens into a cache of {capacity}: "
            f"make it with init_cache(..., max_length={num_tokens} or more)"
        )
    here = (slice(None),) * axis + (slice(0, num_tokens),)
    written = (
        buffer.at[here].set(x.astype(buffer.dtype))
        for buffer, x in zip(buffers, prompts, strict=True)
    )
    return *written, new


def write_token(
    buffers: tuple, tokens: tuple, length: Int[Array, "*B"], window: int | None = None
) -> tuple:
    """Buffers [*B, T, ..] with tokens [*B, 1, ..] at each row's own length, and the new length.

    window: of the layer; see `is_ring`.

    Raises InputError where a row is full, except under `jax.jit`: there the token is not stored,
    and the new length exceeds T.
    """
    axis, rows = length.ndim, jnp.arange(length.size)
    capacity = buffers[0].shape[axis]
    slots = length.reshape(-1)
    if is_ring(capacity, window):
        slots = slots % capacity
    else:
        check_room(length, capacity)
    written = []
    for buffer, x in zip(buffers, tokens, strict=True):
        flat = buffer.reshape(-1, *buffer.shape[axis:])
        x = x.reshape(-1, *x.shape[axis + 1 :]).astype(buffer.dtype)
        flat = flat.at[rows, slots].set(x, mode="drop")
        written.append(flat.reshape(buffer.shape))
    return *written, length + 1
