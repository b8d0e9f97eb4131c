"""Autoregressive decoding on the device, for any model that follows the model protocol."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError, shorten
from slam_jax.generation.sampling import Rules, Sampling, choose
from slam_jax.layers.kv_cache import check_prompts
from slam_jax.layers.masks import prefix_mask
from slam_jax.protocol import Decodable

Tree = TypeVar("Tree")

LEAST_LENGTH = 16
"""Tokens in the smallest bucket of prompts, and of answers."""


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two times `least` that is at least `size`: sizes share few shapes."""
    while least < size:
        least *= 2
    return least


def bucket_rows(arrays: Tree, count: int) -> Tree:
    """The arrays with copies of their last row added: from `count` rows to a power of two."""
    index = np.minimum(np.arange(bucket(count)), count - 1)
    return arrays if len(index) == count else jax.tree.map(lambda x: x[index], arrays)


class Decoded(NamedTuple):
    """New tokens, followed by pads, and their log-probabilities under the model itself (before
    temperature, filters and penalty); 0 for pads."""

    tokens: Int[Array, "B *Q max_new"]
    logprobs: Float[Array, "B *Q max_new"]


class Ends(NamedTuple):
    """What ends a row: one of some tokens, or the last state of a table of `stop_table`; pads
    follow. allowed: the tokens that may be chosen, None = all."""

    end_ids: Int[AnyArray, "ends"]
    pad_id: Int[Array, ""] | int
    stops: Int[AnyArray, "states V"] | None = None
    allowed: Bool[AnyArray, "V"] | None = None


@struct.dataclass
class Decoding:
    """The state of decoding between two tokens; no row depends on another.

    tokens, logprobs: as in `Decoded`. length: new tokens of each row, at most `limit`. done: rows
    that have ended. seen: tokens that each row has, its prompt included. stop_state: of each row,
    in the stop table.
    """

    tokens: Int[Array, "B *Q max_new"]
    logprobs: Float[Array, "B *Q max_new"]
    length: Int[Array, "B *Q"]
    limit: Int[Array, "B *Q"]
    done: Bool[Array, "B *Q"]
    seen: Bool[Array, "B *Q V"]
    stop_state: Int[Array, "B *Q"]
    keys: Key[Array, "B *Q"]
    rules: Rules
    ends: Ends
    cache: Any


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def start_decoding(
    model: Decodable,
    memory: Any,
    prompts: Int[AnyArray, "B *Q T"],
    lengths: Int[AnyArray, "B *Q"],
    keys: Key[Array, "B *Q"],
    rules: Rules,
    ends: Ends,
    limit: Int[AnyArray, "..."] | int,
    max_new_tokens: int,
) -> Decoding:
    """Reads the prompts and chooses the first token of every row. Arguments as in `decode`."""
    # The last token is never fed back, so it needs no room in the cache.
    cache = model.init_cache(prompts.shape[:-1], prompts.shape[-1] + max_new_tokens - 1)
    logits, cache = model.prefill(prompts, cache, memory, lengths=lengths)
    last = jnp.take_along_axis(logits, (lengths - 1)[..., None, None], axis=-2)[..., 0, :]
    real = prefix_mask(lengths, prompts.shape[-1])
    ids = jnp.where(real, prompts, logits.shape[-1])  # pads are beyond the vocabulary: dropped
    unseen, shape = jnp.zeros(last.shape, bool), (*lengths.shape, max_new_tokens)
    # A row ends where its room does, so that none outgrows the cache or the context.
    room = max_new_tokens if (most := context_of(model)) is None else most - lengths
    limit = jnp.minimum(jnp.broadcast_to(limit, lengths.shape), jnp.minimum(room, max_new_tokens))
    state = Decoding(
        tokens=jnp.full(shape, ends.pad_id, prompts.dtype),
        logprobs=jnp.zeros(shape, jnp.float32),
        length=jnp.zeros(lengths.shape, jnp.int32),
        limit=limit,
        done=limit < 1,
        seen=jnp.put_along_axis(unseen, ids, True, axis=-1, inplace=False, mode="drop"),
        stop_state=jnp.zeros(lengths.shape, jnp.int32),
        keys=keys,
        rules=rules,
        ends=ends,
        cache=cache,
    )
    return _choose_next(state, last)


@functools.partial(jax.jit, donate_argnames="state")
def continue_decoding(
    model: Decodable, memory: Any, state: Decoding, until: Int[Array, ""] | int
) -> Decoding:
    """Chooses further tokens until each row has `until` of them or has ended."""

    def unfinished(state: Decoding) -> jax.Array:
        return jnp.any(~state.done & (state.length < until))

    def step(state: Decoding) -> Decoding:
        last = jnp.take_along_axis(state.tokens, state.length[..., None] - 1, axis=-1)[..., 0]
        logits, cache = model.decode_step(last, state.cache, memory)
        return _choose_next(dataclasses.replace(state, cache=cache), logits)

    return jax.lax.while_loop(unfinished, step, state)


def _choose_next(state: Decoding, logits: Float[Array, "B *Q V"]) -> Decoding:
    """The state with one more token of every row that has not ended."""
    fold_in, ends = jax.random.fold_in, state.ends
    logits = only_allowed(logits, ends.allowed)
    for _ in range(state.keys.ndim):
        fold_in = jax.vmap(fold_in)
    token = choose(logits, state.seen, fold_in(state.keys, state.length), state.rules)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)
    length = state.length + ~state.done
    ended = jnp.isin(token, ends.end_ids) | (length >= state.limit)
    stop_state = state.stop_state
    if ends.stops is not None:
        stop_state = jnp.asarray(ends.stops)[stop_state, token]
        ended |= stop_state == len(ends.stops) - 1
    new = jax.nn.one_hot(state.length, state.tokens.shape[-1], dtype=bool) & ~state.done[..., None]
    return dataclasses.replace(
        state,
        tokens=jnp.where(new, token[..., None].astype(state.tokens.dtype), state.tokens),
        logprobs=jnp.where(new, logprob, state.logprobs),
        length=length,
        done=state.done | ended,
        seen=state.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool),
        stop_state=stop_state,
    )


def only_allowed(
    logits: Float[Array, "*B V"], allowed: Bool[AnyArray, "V"] | None
) -> Float[Array, "*B V"]:
    """The logits, with -inf for tokens that may not be chosen."""
    if allowed is None:
        return logits
    return jnp.where(jax.lax.broadcast_to_rank(allowed, logits.ndim), logits, -jnp.inf)


def end_ids_of(eos_id: Any) -> Int[AnyArray, "ends"]:
    """One end token, several of them, or None for none, as an array.

    Raises InputError for anything else.
    """
    if isinstance(eos_id, Tracer):
        return jnp.atleast_1d(eos_id)
    ids = np.atleast_1d(np.asarray([] if eos_id is None else eos_id))
    if ids.ndim > 1 or (ids.size and ids.dtype.kind not in "iu"):
        expected = "a token, a list of tokens that all end an answer, or None"
        raise InputError(f"eos_id is {shorten(repr(eos_id))}; expected {expected}")
    return ids.astype(np.int32)


def decode(
    model: Decodable,
    memory: Any,
    prompts: Int[AnyArray, "B *Q T"],
    lengths: Int[AnyArray, "B *Q"],
    keys: Key[Array, "B *Q"],
    rules: Rules,
    stops: Int[AnyArray, "states V"] | None = None,
    *,
    max_new_tokens: int,
    limit: Int[AnyArray, "B *Q"] | int | None = None,
    eos_id: Any,
    pad_id: int,
    allowed: Bool[AnyArray, "V"] | None = None,
) -> Decoded:
    """Continues every prompt, one token at a time.

    One prefill, then a loop on the device that ends as soon as every row has. A row ends with
    an end token, or with the token that completes a stop string, and yields `pad_id` after it.

    Called by itself it is compiled once for each bucket of shapes: B, T and max_new_tokens are
    rounded up to powers of two, T and max_new_tokens from 16 on. Under `jax.jit` it is a pure
    function of its arguments as they are.

    Args:
      model: a pytree, as an `nnx.Module` is.
      memory: what `model.encode` returned, indexed by B alone, or None for a model without one.
      prompts: right-padded; what is stored at or after a row's length changes nothing.
      lengths: tokens of each prompt, from 1 to T.
      keys: [B, *Q], one per row; token i of a row is drawn with the key folded with i.
      rules: `Sampling(...).rules`.
      stops: of `stop_table`.
      max_new_tokens: how many tokens there is room for.
      limit: how many tokens each row may get; None = max_new_tokens. A row of limit 0 ends at once.
      eos_id: the token that ends a row; of several, each does; None = none. pad_id: any token.
      allowed: the tokens that may be chosen, None = all. A model may have more rows of logits than
        its tokenizer has tokens.

    Raises:
      InputError: `max_new_tokens` is below 1 or, outside of `jax.jit`, a length is not in 1 .. T or
        a prompt and its new tokens exceed the context of the model. Under `jax.jit` such a row ends
        where the context does.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    arrays = (memory, prompts, lengths, keys, max_new_tokens if limit is None else limit)
    count, room = prompts.shape[0], max_new_tokens
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves((model, arrays))):
        check_prompts(lengths, 0, prompts.shape[-1])
        check_context(int(np.asarray(lengths).max()), max_new_tokens, context_of(model))
        arrays, room = _to_buckets(*arrays), bucket(max_new_tokens, LEAST_LENGTH)
    *given, limit = arrays
    ends = Ends(end_ids_of(eos_id), pad_id, stops, allowed)
    state = start_decoding(model, *given, rules, ends, limit, room)
    state = continue_decoding(model, arrays[0], state, max_new_tokens)
    return Decoded(*(x[:count, ..., :max_new_tokens] for x in (state.tokens, state.logprobs)))


def _to_buckets(memory: Any, prompts: Any, lengths: Any, keys: Any, limit: Any) -> tuple[Any, ...]:
    """The same with B and T rounded up; rows beyond B have limit 0."""
    count, length = prompts.shape[0], prompts.shape[-1]
    pads = [(0, 0)] * (prompts.ndim - 1) + [(0, bucket(length, LEAST_LENGTH) - length)]
    arrays = (memory, np.pad(prompts, pads), lengths, keys)
    limit = np.resize(np.broadcast_to(limit, lengths.shape), (bucket(count), *lengths.shape[1:]))
    limit[count:] = 0
    return *bucket_rows(arrays, count), limit


def context_of(model: Any) -> int | None:
    """The most tokens that a row of this model may have, None = not known."""
    return getattr(getattr(model, "config", None), "context_length", None)


def check_context(length: int, new: int, context: int | None) -> None:
    """Raises InputError if a prompt of `length` tokens and `new` ones exceed the context."""
    if context is not None and length + new > context:
        raise InputError(
            f"prompt of {length:,} tokens and {new:,} new ones; the context is {context:,}: "
            "shorten it, or ask for fewer"
        )


def greedy_decode(
    model: Decodable,
    memory: Any,
    prompts: Int[AnyArray, "B *Q T"],
    lengths: Int[AnyArray, "B *Q"],
    *,
    max_new_tokens: int,
    eos_id: Any,
    pad_id: int,
    allowed: Bool[AnyArray, "V"] | None = None,
) -> Decoded:
    """`decode` with the most probable token each time: no keys, no stop strings."""
    keys = jnp.broadcast_to(jax.random.key(0), lengths.shape)
    settings: Any = dict(
        max_new_tokens=max_new_tokens, eos_id=eos_id, pad_id=pad_id, allowed=allowed
    )
    return decode(model, memory, prompts, lengths, keys, Sampling().rules, **settings)
