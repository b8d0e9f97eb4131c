"""The cache of plain attention, and how tokens are written to a cache of fixed capacity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from slam_jax.errors import InputError
from slam_jax.layers.masks import Causal, prefix_mask


@struct.dataclass
class KVCache:
    """The keys and values of every token of one layer, right-padded to a capacity T.

    They are stored as [*B, K, T, H], the order in which attention reads them, so that a decoding
    step transposes nothing. `filled`, `extended` and `appended` take, and `tokens_first` gives,
    [*B, T, K, H]. length: number of tokens of each row; entries at and beyond it are never attended
    to.

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
        """T, the number of tokens that a row has room for."""
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

    def appended(
        self,
        k: Float[Array, "*B t K H"],
        v: Float[Array, "*B t K H_v"],
        lengths: Int[Array, "*B"] | None,
        window: int | None = None,
    ) -> tuple[tuple[Float[Array, "*B T_t K H"], Float[Array, "*B T_t K H_v"]], "KVCache"]:
        """The keys and values that t new tokens attend to, of which `visible_entries` says which,
        and this cache with `lengths` of the tokens (None = all t) after those of each row.

        They are the T entries as they are now, and then the new ones: a ring may lose an entry that
        the first new tokens still attend to. Raises InputError as `write_tokens` does.
        """
        lengths = None if lengths is None else self._per_head(lengths)
        tokens, length = (_swapped(k), _swapped(v)), self._per_head(self.length)
        written = write_tokens((self.k, self.v), tokens, length, lengths, window)
        pairs = zip((self.k, self.v), tokens, strict=True)
        k, v = (_swapped(jnp.concatenate(pair, axis=-2)) for pair in pairs)
        return (k, v), self._written(*written)

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
    _check_lengths(lengths, num_tokens, least=1)
    if not isinstance(stored, Tracer) and np.any(np.asarray(stored)):
        raise InputError(
            f"prefill into a cache that stores {np.asarray(stored).max():,} tokens; give it an "
            "empty one of init_cache, or continue it with append=True (of a layer: append)"
        )


def check_rows(buffers: tuple, tokens: tuple, axis: int) -> None:
    """Raises InputError where tokens have other axes than the buffers, but for that of tokens; they
    would be broadcast."""
    for buffer, x in zip(buffers, tokens, strict=True):
        shapes = [(*each.shape[:axis], *each.shape[axis + 1 :]) for each in (x, buffer)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"tokens {list(x.shape)} for a cache {list(buffer.shape)}; expected as many rows"
            )


def check_appended(lengths: Any, stored: Any, num_tokens: int, room: int | None) -> None:
    """Raises InputError unless there are tokens, lengths are 0 to `num_tokens` and every row has
    room for its new tokens.

    lengths: new tokens of each row, None = all. stored: as in `check_prompts`. room: the most
    tokens that a row of the cache may have, None = any number. Only concrete values are checked.
    """
    _check_lengths(lengths, num_tokens, least=0)
    new = num_tokens if lengths is None else lengths
    if room is None or isinstance(new, Tracer) or isinstance(stored, Tracer):
        return
    most = np.max(np.asarray(stored) + np.asarray(new), initial=0)
    if most > room:
        raise InputError(
            f"a row of the cache would store {most:,} tokens and there is room for {room:,}: make "
            f"it with init_cache(..., max_length={most:,} or more), or append fewer"
        )


def _check_lengths(lengths: Any, num_tokens: int, least: int) -> None:
    if num_tokens < 1:
        raise InputError("prefill of 0 tokens; give at least one a row")
    if lengths is None or isinstance(lengths, Tracer):
        return
    lengths = np.asarray(lengths)
    wrong = lengths[(lengths < least) | (lengths > num_tokens)]
    if wrong.size:
        raise InputError(f"a prompt length is {wrong[0]}; expected {least} to {num_tokens:,}")


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


def stored_positions(
    length: Int[Array, "*B"], capacity: int, window: int | None
) -> Int[Array, "*B T"]:
    """The position of the token that each entry of a cache stores, negative where it stores none.

    length: number of tokens of each row. window: of the layer; see `is_ring`.
    """
    newest = jnp.expand_dims(length - 1, -1)
    slots = jax.lax.broadcast_to_rank(jnp.arange(capacity), newest.ndim)
    if is_ring(capacity, window):
        return newest - (newest - slots) % capacity
    return jnp.where(slots <= newest, slots, -1)


def entries_in_window(
    length: Int[Array, "*B"], capacity: int, window: int | None
) -> Bool[Array, "*B T"]:
    """The entries that the last of `length` tokens attends to: those of its window (None = all)."""
    if window is None or not is_ring(capacity, window):
        return prefix_mask(length, capacity)
    positions = stored_positions(length, capacity, window)
    return (positions >= 0) & (positions >= jnp.expand_dims(length - window, -1))


def visible_entries(
    length: Int[Array, "*B"], num_tokens: int, capacity: int, window: int | None
) -> Bool[Array, "*B t T_t"]:
    """The keys that each of t new tokens attends to: of the T entries of a cache those of its
    window (None = all), and then of the new tokens itself and those before it in its window.

    length: tokens of each row before the new ones, which have the positions from `length` on.
    """
    stored = jnp.expand_dims(stored_positions(length, capacity, window), -2)
    before = jnp.broadcast_to(stored >= 0, (*length.shape, num_tokens, capacity))
    if window is not None:
        before &= stored > jnp.expand_dims(new_positions(length, num_tokens), -1) - window
    among = Causal(window).array(num_tokens)
    return jnp.concatenate([before, jnp.broadcast_to(among, (*length.shape, *among.shape))], -1)


def new_positions(length: Int[Array, "*B"], num_tokens: int) -> Int[Array, "*B t"]:
    """The positions of t new tokens after the `length` tokens of each row."""
    places = jax.lax.broadcast_to_rank(jnp.arange(num_tokens), length.ndim + 1)
    return jnp.expand_dims(length, -1) + places


def write_prompt(
    buffers: tuple,
    prompts: tuple,
    length: Int[Array, "*B"],
    lengths: Int[Array, "*B"] | None,
    window: int | None = None,
) -> tuple:
    """Empty buffers [*B, T, ..] with prompts [*B, t, ..] at their start, and then the new length.

    window: of the layer; see `is_ring`. A ring takes the last T tokens of each row. Buffers that
    store tokens are continued by `write_tokens`.

    Raises InputError where t exceeds the capacity T and the buffers are no ring, and as
    `check_prompts` does.
    """
    axis = length.ndim
    check_rows(buffers, prompts, axis)
    num_tokens, capacity = prompts[0].shape[axis], buffers[0].shape[axis]
    check_prompts(lengths, length, num_tokens)
    new = jnp.full(length.shape, num_tokens) if lengths is None else lengths
    new = new.astype(jnp.int32)
    if num_tokens > capacity and is_ring(capacity, window):
        return *_placed(buffers, prompts, jnp.zeros_like(new), new, window), new
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


def write_tokens(
    buffers: tuple,
    tokens: tuple,
    length: Int[Array, "*B"],
    lengths: Int[Array, "*B"] | None,
    window: int | None = None,
) -> tuple:
    """Buffers [*B, T, ..] with new tokens [*B, t, ..] after the `length` tokens that each row
    stores, and then the new length.

    lengths: new tokens of each right-padded row, 0 to t; None = all t. window: of the layer; see
    `is_ring`. A ring keeps the last T tokens of each row.

    Raises InputError as `check_appended` does. Under `jax.jit` tokens for which a row has no room
    are not stored, and the new length exceeds T.
    """
    check_rows(buffers, tokens, length.ndim)
    num_tokens, capacity = (x[0].shape[length.ndim] for x in (tokens, buffers))
    check_appended(lengths, length, num_tokens, None if is_ring(capacity, window) else capacity)
    new = length + jnp.asarray(num_tokens if lengths is None else lengths, length.dtype)
    return *_placed(buffers, tokens, length, new, window), new


def _placed(
    buffers: tuple, tokens: tuple, length: Int[Array, "*B"], new: Int[Array, "*B"], window
) -> list[Array]:
    """The buffers of rows that grow from `length` to `new` tokens.

    Every entry looks up its token, so that no two tokens of a row are written to one entry.
    """
    axis = length.ndim
    positions = stored_positions(new, buffers[0].shape[axis], window)
    places = positions - jnp.expand_dims(length, -1)
    written = []
    for buffer, x in zip(buffers, tokens, strict=True):
        index = jnp.expand_dims(places, range(axis + 1, x.ndim))
        found = jnp.take_along_axis(x, index, axis, mode="clip").astype(buffer.dtype)
        written.append(jnp.where(index >= 0, found, buffer))
    return written


def write_token(
    buffers: tuple, tokens: tuple, length: Int[Array, "*B"], window: int | None = None
) -> tuple:
    """Buffers [*B, T, ..] with tokens [*B, 1, ..] at each row's own length, and the new length.

    window: of the layer; see `is_ring`.

    Raises InputError where a row is full, except under `jax.jit`: there the token is not stored,
    and the new length exceeds T.
    """
    axis, capacity = length.ndim, buffers[0].shape[length.ndim]
    check_rows(buffers, tokens, axis)
    if tokens[0].shape[axis] != 1:
        raise InputError(f"a step of {tokens[0].shape[axis]} tokens; give one, or append them")
    slots = length
    if is_ring(capacity, window):
        slots = length % capacity
    else:
        check_room(length, capacity)

    def put(row: Array, slot: Array, token: Array) -> Array:
        return row.at[slot].set(token[0], mode="drop")

    # Mapped over the rows, not indexed by their numbers: rows divided over devices then stay there.
    for _ in range(axis):
        put = jax.vmap(put)
    written = [
        put(buffer, slots, x.astype(buffer.dtype))
        for buffer, x in zip(buffers, tokens, strict=True)
    ]
    return *written, length + 1
