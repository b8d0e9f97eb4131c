"""The losses of single tokens: with the logits of all tokens at once, or of a chunk at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from slam_jax.array_typing import AnyArray
from slam_jax.layers.constrain import constrain


class TokenLosses(NamedTuple):
    """The losses of each token.

    cross_entropy: in nats. z: the squared log-normaliser of the logits. correct: 1 where the most
    probable token is the target, else 0.
    """

    cross_entropy: Float[Array, "*B"]
    z: Float[Array, "*B"]
    correct: Float[Array, "*B"]


def token_losses(logits: Float[Array, "*B V"], targets: Int[AnyArray, "*B"]) -> TokenLosses:
    return TokenLosses(
        cross_entropy=optax.softmax_cross_entropy_with_integer_labels(logits, targets),
        z=jax.nn.logsumexp(logits, axis=-1) ** 2,
        correct=jnp.float32(logits.argmax(-1) == targets),
    )


def token_losses_in_chunks(
    head: Callable[[Float[Array, "chunk D"]], Float[Array, "chunk V"]],
    hidden: Float[Array, "*B D"],
    targets: Int[AnyArray, "*B"],
    chunk_tokens: int,
) -> TokenLosses:
    """`token_losses(head(hidden), targets)`, with the logits of `chunk_tokens` tokens at a time.

    A gradient recomputes the logits of each chunk, so never more than one chunk is in memory. The
    gradient of the parameters of the head is summed over the chunks.
    """
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), jnp.asarray(targets).reshape(-1)
    count = -(-len(flat) // chunk_tokens)
    pads = count * chunk_tokens - len(flat)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, pads)] + [(0, 0)] * (x.ndim - 1))
        # Each device takes a share of every chunk; neighbouring tokens may be on one device.
        return constrain(x.reshape(count, chunk_tokens, *x.shape[1:]), (None, "batch"))

    @jax.checkpoint
    def chunk_losses(h: jax.Array, t: jax.Array) -> TokenLosses:
        return token_losses(head(h), t)

    chunks = (split(flat), split(flat_targets))
    _, losses = jax.lax.scan(lambda _, chunk: (None, chunk_losses(*chunk)), None, chunks)
    return TokenLosses(*(x.reshape(-1)[: len(flat)].reshape(targets.shape) for x in losses))
