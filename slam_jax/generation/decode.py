"""Autoregressive decoding on the device, for any model that follows the model protocol."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from slam_jax.errors import InputError
from slam_jax.generation.sampling import Rules, choose, greedy
from slam_jax.protocol import Decodable


class Decoded(NamedTuple):
    """New tokens, pads after the last one, and their log-probabilities under the model itself:
    before temperature, filters and penalty. 0 for pads."""

    tokens: Int[Array, "B *Q max_new"]
    logprobs: Float[Array, "B *Q max_new"]


@struct.dataclass
class Decoding:
    """Where a decoding stands, between two tokens.

    i: tokens chosen. tokens, logprobs: as in `Decoded`. token: the last one. done: rows that have
    ended. seen: tokens that each row has already. stop_state: of its stop table.
    """

    i: Int[Array, ""]
    tokens: Int[Array, "B *Q max_new"]
    logprobs: Float[Array, "B *Q max_new"]
    token: Int[Array, "B *Q"]
    done: Bool[Array, "B *Q"]
    seen: Bool[Array, "B *Q V"]
    stop_state: Int[Array, "B *Q"]
    keys: Key[Array, "B *Q"]
    cache: Any


def start_decoding(
    model: Decodable,
    memory: Any,
    prompts: Int[Array, "B *Q T"],
    lengths: Int[Array, "B *Q"],
    keys: Key[Array, "B *Q"],
    rules: Rules,
    stops: Int[Array, "states V"] | None = None,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    valid: Bool[Array, "B *Q"] | None = None,
) -> Decoding:
    """Reads the prompts and chooses the first token of every row. Arguments as in `decode`."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    # The last token is never fed back, so it needs no room.
    cache = model.init_cache(prompts.shape[:-1], prompts.shape[-1] + max_new_tokens - 1)
    logits, cache = model.prefill(prompts, cache, memory, lengths=lengths)
    last = jnp.take_along_axis(logits, (lengths - 1)[..., None, None], axis=-2)[..., 0, :]
    vocab_size = logits.shape[-1]
    real = jnp.arange(prompts.shape[-1]) < lengths[..., None]
    flat = prompts.reshape(-1, prompts.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    seen = jnp.zeros((flat.shape[0], vocab_size), bool)
    seen = seen.at[rows, flat].max(real.reshape(flat.shape)).reshape(*lengths.shape, vocab_size)
    shape = (*lengths.shape, max_new_tokens)
    state = Decoding(
        i=jnp.int32(0),
        tokens=jnp.full(shape, pad_id, prompts.dtype),
        logprobs=jnp.zeros(shape, jnp.float32),
        token=jnp.full(lengths.shape, pad_id, prompts.dtype),
        done=jnp.zeros(lengths.shape, bool) if valid is None else ~valid,
        seen=seen,
        stop_state=jnp.zeros(lengths.shape, jnp.int32),
        keys=keys,
        cache=cache,
    )
    return _take(state, last, rules, stops, eos_id, pad_id)


def continue_decoding(
    model: Decodable,
    memory: Any,
    state: Decoding,
    rules: Rules,
    stops: Int[Array, "states V"] | None = None,
    *,
    until: Int[Array, ""] | int,
    eos_id: int,
    pad_id: int,
) -> Decoding:
    """Chooses further tokens until there are `until`, or every row has ended."""

    def unfinished(state: Decoding) -> jax.Array:
        return (state.i < until) & ~jnp.all(state.done)

    def step(state: Decoding) -> Decoding:
        logits, cache = model.decode_step(state.token, state.cache, memory)
        return _take(dataclasses.replace(state, cache=cache), logits, rules, stops, eos_id, pad_id)

    return jax.lax.while_loop(unfinished, step, state)


def _take(
    state: Decoding,
    logits: Float[Array, "B *Q V"],
    rules: Rules,
    stops: Int[Array, "states V"] | None,
    eos_id: int,
    pad_id: int,
) -> Decoding:
    """The state with one more token of every row that has not ended."""
    fold_in = jax.random.fold_in
    for _ in range(state.keys.ndim):
        fold_in = jax.vmap(fold_in, in_axes=(0, None))
    token = choose(logits, state.seen, fold_in(state.keys, state.i), rules)
    chosen = jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)[..., 0]
    stop_state, ended = state.stop_state, token == eos_id
    if stops is not None:
        stop_state = stops[stop_state, token]
        ended |= stop_state == stops.shape[0] - 1
    token = jnp.where(state.done, pad_id, token).astype(state.token.dtype)
    return dataclasses.replace(
        state,
        i=state.i + 1,
        tokens=state.tokens.at[..., state.i].set(token),
        logprobs=state.logprobs.at[..., state.i].set(jnp.where(state.done, 0.0, logprob)),
        token=token,
        done=state.done | ended,
        seen=state.seen | chosen,
        stop_state=stop_state,
    )


def decode(
    model: Decodable,
    memory: Any,
    prompts: Int[Array, "B *Q T"],
    lengths: Int[Array, "B *Q"],
    keys: Key[Array, "B *Q"],
    rules: Rules,
    stops: Int[Array, "states V"] | None = None,
    *,
    max_new_tokens: int,
    limit: Int[Array, ""] | int | None = None,
    eos_id: int,
    pad_id: int,
    valid: Bool[Array, "B *Q"] | None = None,
) -> Decoded:
    """Continues every prompt, one token at a time.

    A pure function, meant to be called under `jax.jit`: one prefill, then a loop on the device that
    ends as soon as every row has. A row ends with `eos_id`, or with the token that completes a stop
    string, and yields `pad_id` after it.

    Args:
      memory: what `model.encode` returned, indexed by B alone, or None for a model without one.
      prompts: right-padded; what stands at or after a row's length changes nothing.
      lengths: tokens of each prompt, from 1 to T.
      keys: [B, *Q], one a row; the i-th token of a row is drawn with the i-th key folded from it.
      stops: of `stop_table`.
      max_new_tokens: how many there is room for; `limit`: how many are wanted, None = as many.
      valid: False for rows that are there to fill a shape; they end at once.

    Raises:
      InputError: `max_new_tokens` is below 1.
    """
    settings = {"eos_id": eos_id, "pad_id": pad_id}
    state = start_decoding(
        model,
        memory,
        prompts,
        lengths,
        keys,
        rules,
        stops,
        max_new_tokens=max_new_tokens,
        valid=valid,
        **settings,
    )
    until = max_new_tokens if limit is None else limit
    state = continue_decoding(model, memory, state, rules, stops, until=until, **settings)
    return Decoded(state.tokens, state.logprobs)


def greedy_decode(
    model: Decodable,
    memory: Any,
    prompts: Int[Array, "B *Q T"],
    lengths: Int[Array, "B *Q"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> Decoded:
    """`decode` with the most probable token each time: no keys, no stops."""
    keys = jnp.broadcast_to(jax.random.key(0), lengths.shape)
    return decode(
        model,
        memory,
        prompts,
        lengths,
        keys,
        greedy(),
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
    )
