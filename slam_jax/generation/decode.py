"""Autoregressive decoding on the device, for any model that follows the model protocol."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from slam_jax.errors import InputError
from slam_jax.protocol import Decodable


def greedy_decode(
    model: Decodable,
    memory: Any,
    prompts: Int[Array, "B *Q T"],
    lengths: Int[Array, "B *Q"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> Int[Array, "B *Q {max_new_tokens}"]:
    """Continues every prompt with its most probable token, one at a time.

    A pure function, meant to be called under `jax.jit`: one prefill, then a loop on the device that
    ends as soon as every row has produced `eos_id`. A row yields `pad_id` after its `eos_id`.

    Args:
      memory: what `model.encode` returned, indexed by B alone, or None for a model without one.
      prompts: right-padded; what stands at or after a row's length changes nothing.
      lengths: tokens of each prompt, from 1 to T.

    Raises:
      InputError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    # The last token is never fed back, so it needs no room.
    cache = model.init_cache(prompts.shape[:-1], prompts.shape[-1] + max_new_tokens - 1)
    logits, cache = model.prefill(prompts, cache, memory, lengths=lengths)
    last = jnp.take_along_axis(logits, (lengths - 1)[..., None, None], axis=-2)[..., 0, :]
    token = jnp.argmax(last, axis=-1).astype(prompts.dtype)
    new = jnp.full((*token.shape, max_new_tokens), pad_id, prompts.dtype).at[..., 0].set(token)

    def unfinished(state):
        i, _, done, _, _ = state
        return (i < max_new_tokens) & ~jnp.all(done)

    def step(state):
        i, token, done, cache, new = state
        logits, cache = model.decode_step(token, cache, memory)
        token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1)).astype(new.dtype)
        return i + 1, token, done | (token == eos_id), cache, new.at[..., i].set(token)

    state = (jnp.int32(1), token, token == eos_id, cache, new)
    return jax.lax.while_loop(unfinished, step, state)[-1]
