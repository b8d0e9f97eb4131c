"""A causal depthwise convolution, which mixes each token with the few before it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.array_typing import AnyArray


def short_convolution(
    x: Float[Array, "*B W_1_T D"],
    weights: Float[Array, "W D"],
    positions: Int[Array, "*B T"] | None = None,
) -> Float[Array, "*B T D"]:
    """y_t = sum_w weights_w x_(t + w), a channel at a time, as a sum of shifted products.

    x begins with the W - 1 tokens before the first one, or with zeros in their place. positions: of
    the tokens in their segments; what is before the first token of a segment counts as zeros.
    """
    width, num_tokens = len(weights), x.shape[-2] - len(weights) + 1
    weights = jax.lax.broadcast_to_rank(weights, x.ndim)

    def product(w: int) -> jax.Array:
        y = x[..., w : w + num_tokens, :] * weights[..., w, None, :]
        if positions is None or w == width - 1:
            return y
        return jnp.where((positions >= width - 1 - w)[..., None], y, 0)

    y = product(0)
    for w in range(1, width):
        y = y + product(w)
    return y


class ShortConvolution(nnx.Module):
    """x + the short convolution of x, in which absent tokens count as zeros.

    What belongs to a word is often said beside it, as in "red circle". Attention has to learn first
    how to find a neighbour by its position; here each token knows its neighbours from the start.
    Source: Allen-Zhu 2025, "Physics of Language Models: Part 4.1", section 4 (Canon layers).
    """

    def __init__(self, dim: int, width: int, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        """width: W, tokens that a token is mixed from, itself included."""
        normal = nnx.initializers.normal(width**-0.5)
        self.filter = nnx.Param(normal(rngs.params(), (width, dim), param_dtype))

    def __call__(
        self, x: Float[Array, "*B T D"], mask: Bool[AnyArray, "*B T"] | None = None
    ) -> Float[Array, "*B T D"]:
        """mask: True = present, None = all present."""
        weights = self.filter[...].astype(x.dtype)
        present = x if mask is None else jnp.where(jnp.asarray(mask)[..., None], x, 0)
        before = [(0, 0)] * (x.ndim - 2) + [(len(weights) - 1, 0), (0, 0)]
        return x + short_convolution(jnp.pad(present, before), weights)
