"""Attention over explicit keys and values, and the self-attention built from it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.linear import Linear
from slam_jax.layers.rotary import rotary


def masked_softmax(
    logits: Float[Array, "*B T S"], mask: Bool[Array, "*#B #T S"] | None
) -> Float[Array, "*B T S"]:
    """Softmax in float32 over the keys that may be attended to; a row that has none yields 0.

    Gradients are finite for such rows too: no infinity ever enters.
    """
    logits = logits.astype(jnp.float32)
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)


def attention_weights(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S N H"],
    mask: Bool[Array, "*#B #T S"] | None = None,
) -> Float[Array, "*B N T S"]:
    """How much each query attends to each key, in float32; arguments as in `attend`."""
    # Heads first: as one batched matmul with its batch in front, XLA:CPU is several times faster.
    q, k = jnp.swapaxes(q, -2, -3), jnp.swapaxes(k, -2, -3)
    logits = jnp.einsum("...th,...sh->...ts", q, k, preferred_element_type=jnp.float32)
    mask = None if mask is None else mask[..., None, :, :]
    return masked_softmax(logits * q.shape[-1] ** -0.5, mask)


def attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S N H"],
    v: Float[Array, "*B S N V"],
    mask: Bool[Array, "*#B #T S"] | None = None,
) -> Float[Array, "*B T N V"]:
    """Scaled dot-product attention; `mask` True = attend, None = everything.

    Scores and softmax are float32. Source: Vaswani et al. 2017, section 3.2.1.
    """
    probs, v = attention_weights(q, k, mask), jnp.swapaxes(v, -2, -3)
    y = jnp.einsum("...ts,...sv->...tv", probs.astype(v.dtype), v)
    return jnp.swapaxes(y, -2, -3)


class SelfAttention(nnx.Module):
    """Multi-head self-attention without biases; rotary positions where they are given.

    out_scale: of the initial output map, as in `GatedMLP`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        out_scale: float = 1.0,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        heads = (num_heads, head_dim)
        self.query = Linear(embed_dim, heads, **kw)
        self.key = Linear(embed_dim, heads, **kw)
        self.value = Linear(embed_dim, heads, **kw)
        self.out = Linear(heads, embed_dim, init_scale=out_scale, **kw)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        mask: Bool[Array, "*#B #T T"] | None = None,
        positions: Int[Array, "*#B T"] | None = None,
    ) -> Float[Array, "*B T D"]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if positions is not None:
            q, k = rotary(q, positions), rotary(k, positions)
        return self.out(attend(q, k, v, mask))
