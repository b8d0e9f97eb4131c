"""Attention masks: arrays, or `Causal`, which a kernel applies without reading an array."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError


@struct.dataclass
class Causal:
    """Each token may attend to itself and to the tokens before it.

    window: only to itself and the window - 1 tokens before it; None = no limit.
    """

    window: int | None = struct.field(pytree_node=False, default=None)

    def array(self, num_tokens: int) -> Bool[Array, "T T"]:
        t = jnp.arange(num_tokens)
        distance = t[:, None] - t[None]
        visible = distance >= 0
        return visible if self.window is None else visible & (distance < self.window)


Mask = Bool[Array, "*#B #T S"] | Causal | None
"""What each of the T queries may attend to among the S keys.

An array in which True = attend; its axes broadcast. Or `Causal`, or None = everything.
"""


def as_array(mask: Mask, num_queries: int, num_keys: int) -> Bool[Array, "*#B #T S"] | None:
    """The mask as an array; None stays None."""
    require_square(mask, num_queries, num_keys)
    return mask.array(num_keys) if isinstance(mask, Causal) else mask


def in_window(
    visible: Bool[Array, "*#B T T"] | Causal, num_tokens: int, window: int | None
) -> Bool[Array, "*#B T T"] | Causal:
    """A causal mask without what is `window` tokens before a token, or earlier; None = no limit."""
    if window is None:
        return visible
    if isinstance(visible, Causal):
        return Causal(window)
    near = Causal(window).array(num_tokens)
    return jax.lax.broadcast_to_rank(near, visible.ndim) & visible


def require_square(mask: Mask, num_queries: int, num_keys: int) -> None:
    """Raises InputError for a `Causal` mask where the numbers of queries and keys differ."""
    if isinstance(mask, Causal) and num_queries != num_keys:
        raise InputError(
            f"a Causal mask over {num_queries} queries and {num_keys} keys; expected equal "
            "numbers, or an array for a mask"
        )


def prefix_mask(lengths: Int[AnyArray, "*B"], size: int) -> Bool[Array, "*B size"]:
    """True for the first `lengths` of the `size` places of each row."""
    places = jax.lax.broadcast_to_rank(jnp.arange(size), lengths.ndim + 1)
    return places < lengths[..., None]


def without_unknown_pads(
    tokens: Int[AnyArray, "*B T"], mask: Bool[AnyArray, "*B T"] | None, vocab_size: int
) -> Int[Array, "*B T"]:
    """The tokens, with 0 for each pad whose id is outside of the vocabulary.

    The embedding of such an id is NaN, and 0 times NaN would reach the real tokens.
    """
    tokens = jnp.asarray(tokens)
    if mask is None:
        return tokens
    return jnp.where(mask | ((tokens >= 0) & (tokens < vocab_size)), tokens, 0)
