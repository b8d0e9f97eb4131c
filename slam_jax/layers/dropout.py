"""Dropout whose randomness is an argument."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

# The key of a forward pass in training; None = no dropout.
DropoutKey = PRNGKeyArray | None


def dropout(x: Float[Array, "*B"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*B"]:
    """Zeroes each element with probability `rate` and scales the rest; key None = no dropout.

    The key is an argument: a random stream stored in a module would be shared by the members of a
    vmap, but each of the four processes needs its own.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split(key: PRNGKeyArray | None, num: int) -> list[PRNGKeyArray | None]:
    """`num` keys from one, or `num` times None from None."""
    return [None] * num if key is None else list(jax.random.split(key, num))
