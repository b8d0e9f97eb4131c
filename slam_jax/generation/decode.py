"""Autoregressive decoding on the device, for any model that follows the model protocol."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError
from slam_jax.generation.sampling import Rules, Sampling, choose
from slam_jax.layers.kv_cache import check_prompts
from slam_jax.layers.masks import prefix_mask
from slam_jax.protocol import Decodable

LEAST_LENGTH = 16
"""Tokens in the smallest bucket of prompts, and of answers."""


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two times `least` that is at least `size`: sizes share few shapes."""
    while least < size:
        least *= 2
    return least


class Decoded(NamedTuple):
    """New tokens, followed by pads, and their log-probabilities under the model itself (before
    temperature, filters and penalty); 0 for pads."""

    tokens: Int[Array, "B *Q max_new"]
    logprobs: Float[Array, "B *Q max_new"]


@struct.dataclass
class Decoding:
    """The state of decoding between two tokens.

    i: steps so far. tokens, logprobs: as in `Decoded`. token: the last one chosen. length: new
    tokens of each row, at most `limit`. done: rows that have ended. seen: tokens that each row has,
    its prompt included. stop_state: of each row, in the stop table.
    """

    i: Int[Array, ""]
    tokens: Int[Array, "B *Q max_new"]
    logprobs: Float[Array, "B *Q max_new"]
    token: Int[Array, "B *Q"]
    length: Int[Array, "B *Q"]
    limit: Int[Array, "B *Q"]
    done: Bool[Array, "B *Q"]
    seen: Bool[Array, "B *Q V"]
    stop_state: Int[Array, "B *Q"]
    keys: Key[Array, "B *Q"]
    cache: Any


class Ends(NamedTuple):
    """What ends a row: its <eos>, or the last state of a table of `stop_table`; pads follow."""

    eos_id: Int[Array, ""] | int
    pad_id: Int[Array, ""] | int
    stops: Int[AnyArray, "states V"] | None = None


def start_decoding(
    model: Decodable,
    memory: Any,
    prompts: Int[AnyArray, "B *Q T"],
    lengths: Int[AnyArray, "B *Q"],
    keys: Key[Array, "B *Q"],
    rules: Rules,
    ends: Ends,
    limit: Int[AnyArray, "B *Q"] | int,
    max_new_tokens: int,
) -> Decoding:
    """Reads the prompts and chooses the first token of every row. Arguments as in `decode`."""
    # The last token is never fed back, so it needs no room in the cache.
    cache = model.init_cache(prompts.shape[:-1], prompts.shape[-1] + max_new_tokens - 1)
    logits, cache = model.prefill(prompts, cache, memory, lengths=lengths)
    last = jnp.take_along_axis(logits, (lengths - 1)[..., None, None], axis=-2)[..., 0, :]
    vocab_size = logits.shape[-1]
    real = prefix_mask(lengths, prompts.shape[-1])
    flat = prompts.reshape(-1, prompts.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    seen = jnp.zeros((flat.shape[0], vocab_size), bool)
    seen = seen.at[rows, flat].max(real.reshape(flat.shape)).reshape(*lengths.shape, vocab_size)
    shape = (*lengths.shape, max_new_tokens)
    limit = jnp.broadcast_to(limit, lengths.shape)
    state = Decoding(
        i=jnp.int32(0),
        tokens=jnp.full(shape, ends.pad_id, prompts.dtype),
        logprobs=jnp.zeros(shape, jnp.float32),
        token=jnp.zeros(lengths.shape, prompts.dtype),
        length=jnp.zeros(lengths.shape, jnp.int32),
        limit=limit,
        done=limit < 1,
        seen=seen,
        stop_state=jnp.zeros(lengths.shape, jnp.int32),
        keys=keys,
        cache=cache,
    )
    return _take(state, last, rules, ends)


def continue_decoding(
    model: Decodable,
    memory: Any,
    state: Decoding,
    rules: Rules,
    ends: Ends,
    until: Int[Array, ""] | int,
) -> Decoding:
    """Chooses further tokens until there are `until`, or every row has ended."""

    def unfinished(state: Decoding) -> jax.Array:
        return (state.i < until) & ~jnp.all(state.done)

    def step(state: Decoding) -> Decoding:
        logits, cache = model.decode_step(state.token, state.cache, memory)
        return _take(dataclasses.replace(state, cache=cache), logits, rules, ends)

    return jax.lax.while_loop(unfinished, step, state)


start = jax.jit(start_decoding, static_argnames="max_new_tokens")
proceed = jax.jit(continue_decoding, donate_argnames="state")


def _take(state: Decoding, logits: Float[Array, "B *Q V"], rules: Rules, ends: Ends) -> Decoding:
    """The state with one more token of every row that has not ended."""
    fold_in = jax.random.fold_in
    for _ in range(state.keys.ndim):
        fold_in = jax.vmap(fold_in, in_axes=(0, None))
    token = choose(logits, state.seen, fold_in(state.keys, state.i), rules)
    chosen = jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)[..., 0]
    length = state.length + ~state.done
    stop_state, ended = state.stop_state, (token == ends.eos_id) | (length >= state.limit)
    if ends.stops is not None:
        stop_state = jnp.asarray(ends.stops)[stop_state, token]
        ended |= stop_state == len(ends.stops) - 1
    shown = jnp.where(state.done, ends.pad_id, token).astype(state.tokens.dtype)
    return dataclasses.replace(
        state,
        i=state.i + 1,
        tokens=state.tokens.at[..., state.i].set(shown),
        logprobs=state.logprobs.at[..., state.i].set(jnp.where(state.done, 0.0, logprob)),
        token=token.astype(state.token.dtype),
        length=length,
        done=state.done | ended,
        seen=state.seen | chosen,
        stop_state=stop_state,
    )


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
    eos_id: int,
    pad_id: int,
) -> Decoded:
    """Continues every prompt, one token at a time.

    One prefill, then a loop on the device that ends as soon as every row has. A row ends with
    `eos_id`, or with the token that completes a stop string, and yields `pad_id` after it.

    Called by itself it is compiled once for each bucket of shapes: B, T and max_new_tokens are
    rounded up to powers of two, T and max_new_tokens from 16 on. The model must be a pytree, as an
    `nnx.Module` is. Under `jax.jit` it is a pure function of its arguments as they are.

    Args:
      memory: what `model.encode` returned, indexed by B alone, or None for a model without one.
      prompts: right-padded; what is stored at or after a row's length changes nothing.
      lengths: tokens of each prompt, from 1 to T.
      keys: [B, *Q], one per row; token i of a row is drawn with the key folded with i.
      rules: `Sampling(...).rules`.
      stops: of `stop_table`.
      max_new_tokens: how many tokens there is room for.
      limit: how many tokens each row may get; None = max_new_tokens. A row of limit 0 ends at once.

    Raises:
      InputError: `max_new_tokens` is below 1 or, outside of `jax.jit`, a length is not in 1 .. T or
        a prompt and its new tokens exceed the context of the model.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    ends, limit = Ends(eos_id, pad_id, stops), max_new_tokens if limit is None else limit
    arrays = (memory, prompts, lengths, keys, limit)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((model, arrays))):
        memory, prompts, lengths, keys, limit = arrays
        state = start_decoding(
            model, memory, prompts, lengths, keys, rules, ends, limit, max_new_tokens
        )
        state = continue_decoding(model, memory, state, rules, ends, max_new_tokens)
        return Decoded(state.tokens, state.logprobs)
    _check_context(model, prompts, lengths, max_new_tokens)
    count, room = prompts.shape[0], bucket(max_new_tokens, LEAST_LENGTH)
    memory, prompts, lengths, keys, limit = _to_buckets(*arrays)
    state = start(model, memory, prompts, lengths, keys, rules, ends, limit, room)
    state = proceed(model, memory, state, rules, ends, max_new_tokens)
    return Decoded(*(x[:count, ..., :max_new_tokens] for x in (state.tokens, state.logprobs)))


def _check_context(model: Any, prompts: Any, lengths: Any, max_new_tokens: int) -> None:
    check_prompts(lengths, 0, prompts.shape[-1])
    context = getattr(getattr(model, "config", None), "context_length", None)
    if context is not None and (longest := int(np.max(lengths))) + max_new_tokens > context:
        raise InputError(
            f"prompt of {longest:,} tokens and {max_new_tokens:,} new ones; the context is "
            f"{context:,}: shorten it, or ask for fewer"
        )


def _to_buckets(memory: Any, prompts: Any, lengths: Any, keys: Any, limit: Any) -> tuple[Any, ...]:
    """The same with B and T rounded up; rows beyond B repeat the last one and have limit 0."""
    count, rows, length = len(prompts), bucket(len(prompts)), prompts.shape[-1]
    limit = np.broadcast_to(limit, lengths.shape)
    if rows > count:
        index = np.minimum(np.arange(rows), count - 1)
        memory, prompts, lengths, keys, limit = jax.tree.map(
            lambda x: x[index], (memory, prompts, lengths, keys, limit)
        )
        limit = np.where((np.arange(rows) < count).reshape(-1, *[1] * (limit.ndim - 1)), limit, 0)
    pads = [(0, 0)] * (prompts.ndim - 1) + [(0, bucket(length, LEAST_LENGTH) - length)]
    return memory, np.pad(prompts, pads), lengths, keys, limit


def greedy_decode(
    model: Decodable,
    memory: Any,
    prompts: Int[AnyArray, "B *Q T"],
    lengths: Int[AnyArray, "B *Q"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> Decoded:
    """`decode` with the most probable token each time: no keys, no stop strings."""
    keys = jnp.broadcast_to(jax.random.key(0), lengths.shape)
    return decode(
        model,
        memory,
        prompts,
        lengths,
        keys,
        Sampling().rules,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
    )
