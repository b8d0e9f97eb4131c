"""Attention over explicit keys and values, and the self-attention built from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.errors import InputError
from slam_jax.kernels import cudnn_attention
from slam_jax.layers.linear import Linear
from slam_jax.layers.masks import Causal, Mask, as_array, require_square
from slam_jax.layers.precision import upcast
from slam_jax.layers.rotary import rotary


def masked_softmax(
    logits: Float[Array, "*B T S"], mask: Bool[Array, "*#B #T S"] | None
) -> Float[Array, "*B T S"]:
    """Softmax over the keys that may be attended to, in float32 or wider.

    A row with no such key yields 0, and its gradients are finite: no infinity is ever computed.
    """
    logits = logits.astype(upcast(logits.dtype))
    if mask is None:
        return jax.nn.softmax(logits, axis=-1)
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)


class Layout(NamedTuple):
    """Where the tokens and pads of a batch are in their rows.

    positions: position of each token in its row. mask: True = a real token, None = all are real.
    visible: True where a token may attend to another, which is real and not later; `Causal()`
    where there are no pads.
    """

    positions: Int[Array, "*#B T"]
    mask: Bool[Array, "*B T"] | None
    visible: Bool[Array, "*#B T T"] | Causal


def causal_layout(num_tokens: int, mask: Bool[Array, "*B T"] | None = None) -> Layout:
    """The layout of rows of `num_tokens` tokens, with pads (left, right or both) where `mask` is
    False. The first real token of a row has position 0."""
    if mask is None:
        return Layout(jnp.arange(num_tokens), None, Causal())
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    causal = jax.lax.broadcast_to_rank(Causal().array(num_tokens), mask.ndim + 1)
    visible = causal & mask[..., None, :]
    return Layout(positions, mask, visible)


def attention_weights(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    mask: Mask = None,
) -> Float[Array, "*B N T S"]:
    """The weight of each key for each query, in float32 or wider; arguments as in `attend`."""
    # Heads first: as one batched matmul with its batch in front, XLA:CPU is several times faster.
    q, k = jnp.swapaxes(q, -2, -3), jnp.swapaxes(k, -2, -3)
    shape = (*q.shape[:-1], k.shape[-2])
    q = _by_group(q, k.shape[-3])
    logits = jnp.einsum("...th,...sh->...ts", q, k, preferred_element_type=upcast(q.dtype))
    visible = as_array(mask, *shape[-2:])
    visible = None if visible is None else visible[..., None, :, :]
    return masked_softmax(logits.reshape(shape) * q.shape[-1] ** -0.5, visible)


def attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H_v"],
    mask: Mask = None,
) -> Float[Array, "*B T N H_v"]:
    """Scaled dot-product attention; scores and softmax are float32 or wider.

    mask: True = attend, None = everything, or `Causal`. Each N / K neighbouring query heads share
    one head of keys and values.

    Raises InputError where N is no multiple of K, or for `Causal` where T is not S.
    Sources: Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023, "GQA", section 2.2.
    """
    _require_groups(q.shape[-2], k.shape[-2])
    require_square(mask, q.shape[-3], k.shape[-3])
    if isinstance(mask, Causal) and cudnn_attention.fits(q, max(q.shape[-1], v.shape[-1])):
        return cudnn_attention.causal_attend(q, k, v, mask)
    probs, v = attention_weights(q, k, mask), jnp.swapaxes(v, -2, -3)
    shape = (*probs.shape[:-1], v.shape[-1])
    y = jnp.einsum("...ts,...sv->...tv", _by_group(probs.astype(v.dtype), v.shape[-3]), v)
    return jnp.swapaxes(y.reshape(shape), -2, -3)


def _by_group(x: Float[Array, "*B N T C"], num_groups: int) -> Float[Array, "*B K GT C"]:
    """Concatenates the rows of the heads of each group; heads of a group are neighbours."""
    _require_groups(x.shape[-3], num_groups)
    rows = x.shape[-3] * x.shape[-2] // num_groups  # -1 is ambiguous for an empty batch
    return x.reshape(*x.shape[:-3], num_groups, rows, x.shape[-1])


def _require_groups(num_heads: int, num_groups: int) -> None:
    if num_heads % num_groups:
        raise InputError(
            f"{num_heads} heads of queries and {num_groups} of keys; expected a multiple of these"
        )


class SelfAttention(nnx.Module):
    """Multi-head self-attention without biases; rotary positions where they are given.

    embed_dim: D. num_heads: N. head_dim: H of queries, keys and values. out_scale: scale of the
    initial output map, as in `GatedMLP`.
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
        kw: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        heads = (num_heads, head_dim)
        self.query = Linear(embed_dim, heads, **kw)
        self.key = Linear(embed_dim, heads, **kw)
        self.value = Linear(embed_dim, heads, **kw)
        self.out = Linear(heads, embed_dim, init_scale=out_scale, **kw)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        mask: Mask = None,
        positions: Int[Array, "*#B T"] | None = None,
    ) -> Float[Array, "*B T D"]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if positions is not None:
            q, k = rotary(q, positions), rotary(k, positions)
        return self.out(attend(q, k, v, mask))
