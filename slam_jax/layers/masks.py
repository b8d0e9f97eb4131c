"""Who may attend to whom: an array, or the words for one that a kernel need not read."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool


@struct.dataclass
class Causal:
    """Each token may attend to itself and to those before it.

    window: to itself and the window - 1 tokens before it, None = all.
    """

    window: int | None = struct.field(pytree_node=False, default=None)

    def array(self, num_tokens: int) -> Bool[Array, "T T"]:
        t = jnp.arange(num_tokens)
        distance = t[:, None] - t
        visible = distance >= 0
        return visible if self.window is None else visible & (distance < self.window)


# True = attend, None = everything.
Mask = Bool[Array, "*#B #T S"] | Causal | None


def as_array(mask: Any, num_tokens: int) -> Any:
    """The mask itself, and an array for one in words."""
    return mask.array(num_tokens) if isinstance(mask, Causal) else mask
