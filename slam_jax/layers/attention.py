"""Attention over explicit keys and values, and the self-attention built from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.errors import InputError
from slam_jax.kernels import fused_attention
from slam_jax.layers.linear import Linear
from slam_jax.layers.masks import Causal, Mask, as_array, require_square
from slam_jax.layers.norms import RMSNorm
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
    visible: True where a token may attend to another, which is real, of the same segment and not
    later; `Causal()` where there are neither pads nor segments. packed: whether rows have segments,
    each of which begins at position 0.
    """

    positions: Int[Array, "*#B T"]
    mask: Bool[Array, "*B T"] | None
    visible: Bool[Array, "*#B T T"] | Causal
    packed: bool = False


def causal_layout(
    num_tokens: int,
    mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
) -> Layout:
    """The layout of rows of `num_tokens` tokens, with pads (left, right or both) where `mask` is
    False. The first real token of a row has position 0.

    segment_ids: instead of a mask, the segment of each token, such as the text that it is from; 0
    for pads. Tokens of a segment are neighbours.
    """
    if segment_ids is not None:
        return _packed_layout(num_tokens, segment_ids)
    if mask is None:
        return Layout(jnp.arange(num_tokens), None, Causal())
    positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
    causal = jax.lax.broadcast_to_rank(Causal().array(num_tokens), mask.ndim + 1)
    visible = causal & mask[..., None, :]
    return Layout(positions, mask, visible)


def _packed_layout(num_tokens: int, segment_ids: Int[Array, "*B T"]) -> Layout:
    mask, places = segment_ids > 0, jnp.arange(num_tokens)
    before = jnp.pad(segment_ids, [(0, 0)] * (segment_ids.ndim - 1) + [(1, 0)])[..., :-1]
    places = jax.lax.broadcast_to_rank(places, segment_ids.ndim)
    starts = jnp.where(segment_ids != before, places, 0)
    first = jax.lax.cummax(starts, axis=segment_ids.ndim - 1)
    same = segment_ids[..., :, None] == segment_ids[..., None, :]
    causal = jax.lax.broadcast_to_rank(Causal().array(num_tokens), same.ndim)
    return Layout(places - first, mask, causal & same & mask[..., None, :], packed=True)


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
    width = max(q.shape[-1], v.shape[-1])
    if kernel := fused_attention.kernel_of(q, k.shape[-3], width, mask):
        return fused_attention.fused_attend(q, k, v, mask, kernel)
    return plain_attend(q, k, v, mask)


def plain_attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H_v"],
    mask: Mask = None,
) -> Float[Array, "*B T N H_v"]:
    """`attend` without kernels: it stores the scores of all pairs of tokens."""
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


def attend_rotated(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T N H"],
    v: Float[Array, "*B T N H_v"],
    mask: Mask,
    positions: Int[Array, "*#B P"] | None,
) -> Float[Array, "*B T N H_v"]:
    """`attend` with rotary positions of the first tokens.

    positions: of the first P <= T tokens, None = of no token. The later tokens have no position:
    their scores with each other and with the first ones are those without a rotation.
    """
    if positions is None:
        return attend(q, k, v, mask)
    count = positions.shape[-1]
    q_first, k_first = (rotary(x[..., :count, :, :], positions) for x in (q, k))
    if count == q.shape[-3]:
        return attend(q_first, k_first, v, mask)
    # One softmax over both kinds of scores: queries are twice as wide, and keys are zero in the
    # half that does not concern them. `attend` divides by the root of the doubled width.
    wide = jnp.concatenate([q_first, q[..., :count, :, :]], axis=-1) * 2**0.5
    plain = jnp.pad(k[..., count:, :, :], [(0, 0)] * (k.ndim - 1) + [(k.shape[-1], 0)])
    rotated = jnp.pad(k_first, [(0, 0)] * (k.ndim - 1) + [(0, k.shape[-1])])
    keys = jnp.concatenate([rotated, plain], axis=-3)
    visible = as_array(mask, q.shape[-3], k.shape[-3])
    masks = visible, visible
    if visible is not None and visible.shape[-2] > 1:
        masks = visible[..., :count, :], visible[..., count:, :]
    first = attend(wide, keys, v, masks[0])
    return jnp.concatenate([first, attend(q[..., count:, :, :], k, v, masks[1])], axis=-3)


class SelfAttention(nnx.Module):
    """Multi-head self-attention; rotary positions where they are given.

    embed_dim: D. num_heads: N. head_dim: H of queries, keys and values. qkv_bias: of their maps.
    out_bias: of the output map. qk_norm: RMS norms over each head of the queries and of the keys,
    before they are rotated (Henry et al. 2020, "Query-Key Normalization for Transformers").
    out_scale: scale of the initial output map, as in `GatedMLP`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        out_scale: float = 1.0,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        heads = (num_heads, head_dim)
        self.q_norm = RMSNorm(head_dim, param_dtype=param_dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, param_dtype=param_dtype) if qk_norm else None
        self.query = Linear(embed_dim, heads, use_bias=qkv_bias, **kw)
        self.key = Linear(embed_dim, heads, use_bias=qkv_bias, **kw)
        self.value = Linear(embed_dim, heads, use_bias=qkv_bias, **kw)
        self.out = Linear(heads, embed_dim, use_bias=out_bias, init_scale=out_scale, **kw)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        mask: Mask = None,
        positions: Int[Array, "*#B P"] | None = None,
    ) -> Float[Array, "*B T D"]:
        """positions: of the first P tokens, as in `attend_rotated`."""
        q, k, v = self.queries(x), self.keys(x), self.value(x)
        return self.out(attend_rotated(q, k, v, mask, positions))

    def queries(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T N H"]:
        """The queries of x, normed if `qk_norm`."""
        return self.query(x) if self.q_norm is None else self.q_norm(self.query(x))

    def keys(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T N H"]:
        """The keys of x, normed if `qk_norm`."""
        return self.key(x) if self.k_norm is None else self.k_norm(self.key(x))
