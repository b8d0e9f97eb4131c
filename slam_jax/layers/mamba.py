"""Mamba-1: a linear recurrence whose coefficients depend on the token, instead of attention.

Source: Gu & Dao 2023, "Mamba" (arXiv 2312.00752), sections 3.2 to 3.4; norms on dt, B and C:
Lieber et al. 2024, "Jamba" (arXiv 2403.19887), section 6.4.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.attention import Layout, causal_layout
from slam_jax.layers.linear import LECUN_NORMAL, Initializer, Linear
from slam_jax.layers.masks import prefix_mask
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.precision import upcast
from slam_jax.layers.short_convolution import short_convolution

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4


@struct.dataclass
class MambaCache:
    """The state of one layer after all tokens so far; its size does not depend on their number.

    conv: the last W - 1 inputs of the convolution. state: of the recurrence.
    """

    conv: Float[Array, "*B W_1 I"]
    state: Float[Array, "*B I state"]


def selective_scan(
    x: Float[Array, "*B T I"],
    dt: Float[Array, "*B T I"],
    a: Float[Array, "I state"],
    b: Float[Array, "*B T state"],
    c: Float[Array, "*B T state"],
    state: Float[Array, "*B I state"],
    *,
    chunk_size: int,
    starts: Bool[Array, "*B T"] | None = None,
) -> tuple[Float[Array, "*B T I"], Float[Array, "*B I state"]]:
    """y_t = c_t h_t with h_t = exp(dt_t a) h_(t-1) + dt_t b_t x_t, and the last h; h_0 is `state`.

    The states [T, I, state] never exist all at once: chunks of tokens are scanned one after the
    other, only the states between chunks are stored for the gradient, and the rest is recomputed.
    A token whose dt is 0 leaves the state as it is. starts: where the state is 0 before the token.
    """
    num_tokens = x.shape[-2]
    num_chunks = -(-num_tokens // chunk_size)

    def in_chunks(z):
        """[*B, T, C] -> [chunks, chunk_size, *B, C], with dt = 0 after the last token."""
        z = jnp.moveaxis(z, -2, 0)
        z = jnp.pad(z, [(0, num_chunks * chunk_size - num_tokens)] + [(0, 0)] * (z.ndim - 1))
        return z.reshape(num_chunks, chunk_size, *z.shape[1:])

    def step(state, token):
        x, dt, b, c, *start = token
        decay = jnp.exp(dt[..., None, :] * rates)
        if start:
            decay = jnp.where(start[0][..., None], 0, decay)
        state = decay * state + (dt * x)[..., None, :] * b[..., :, None]
        return state, jnp.sum(state * c[..., :, None], axis=-2)

    @jax.checkpoint
    def chunk(state, tokens):
        return jax.lax.scan(step, state, tokens)

    # Inside, states are [*B, state, I]: sums over the few states are then sums of whole rows.
    rates = jax.lax.broadcast_to_rank(a.T, state.ndim)
    more = () if starts is None else (starts[..., None],)
    inputs = tuple(map(in_chunks, (x, dt, b, c, *more)))
    state, y = jax.lax.scan(chunk, jnp.swapaxes(state, -1, -2), inputs)
    y = y.reshape(num_chunks * chunk_size, *y.shape[2:])[:num_tokens]
    return jnp.moveaxis(y, 0, -2), jnp.swapaxes(state, -1, -2)


def _uniform(bound: float) -> Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Mamba(nnx.Module):
    """A Mamba layer, with the methods of an attention layer.

    Args:
      embed_dim: D. state_dim: numbers per channel of the state. conv_width: W, tokens that the
        causal convolution sees. expand: I / D. dt_rank: of the map to dt, None = ceil(D / 16).
      norm_epsilon: of learned RMS norms on dt, B and C, as in Jamba; None = no norms, as in Mamba.
      conv_bias, proj_bias: of the convolution, and of the maps in and out.
      chunk_size: tokens between two stored states.

    The recurrence and its coefficients are float32 or wider, and so are the parameters A, D and the
    bias of dt: in bfloat16 they overflow, and the updates of dt are rounded away.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        state_dim: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        norm_epsilon: float | None = None,
        conv_bias: bool = True,
        proj_bias: bool = False,
        chunk_size: int = 32,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, dt_rank = expand * embed_dim, dt_rank or math.ceil(embed_dim / 16)
        self.width, self.state_dim, self.conv_width = width, state_dim, conv_width
        self.chunk_size, self.dtype, self.norm_epsilon = chunk_size, dtype, norm_epsilon
        self.value = Linear(embed_dim, width, use_bias=proj_bias, **kw)
        self.gate = Linear(embed_dim, width, use_bias=proj_bias, **kw)
        # The initial values of a depthwise convolution in PyTorch.
        conv_init = _uniform(conv_width**-0.5)
        self.conv_filter = nnx.Param(conv_init(rngs.params(), (conv_width, width), param_dtype))
        self.conv_bias = nnx.Param(jnp.zeros((width,), param_dtype)) if conv_bias else None
        self.dt_down = Linear(width, dt_rank, **kw)
        self.b = Linear(width, state_dim, **kw)
        self.c = Linear(width, state_dim, **kw)
        if norm_epsilon is not None:
            norm: Any = dict(epsilon=norm_epsilon, param_dtype=param_dtype)
            self.dt_norm = RMSNorm(dt_rank, **norm)
            self.b_norm, self.c_norm = RMSNorm(state_dim, **norm), RMSNorm(state_dim, **norm)
        # dt starts between 0.001 and 0.1 whatever the token (Mamba, section 3.6).
        dt_init = _uniform(dt_rank**-0.5)
        own: Any = {"kernel_init": dt_init, "dtype": upcast(dtype)}
        self.dt_up = Linear(dt_rank, width, use_bias=True, **{**kw, **own})
        kept = upcast(param_dtype)
        log_dt = jax.random.uniform(
            rngs.params(), (width,), kept, math.log(_DT_MIN), math.log(_DT_MAX)
        )
        dt = jnp.maximum(jnp.exp(log_dt), _DT_FLOOR)
        # The inverse of softplus.
        self.dt_up.bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))
        # These are no kernels, so that weight decay does not apply to them.
        log_a = jnp.log(jnp.arange(1, state_dim + 1, dtype=kept))
        self.a_log = nnx.Param(jnp.tile(log_a, (width, 1)))
        self.skip = nnx.Param(jnp.ones((width,), kept))
        self.out = Linear(width, embed_dim, use_bias=proj_bias, **kw)

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> MambaCache:
        """An empty cache for rows of `batch_shape`; `max_length` has no effect on its size."""
        return MambaCache(
            conv=jnp.zeros((*batch_shape, self.conv_width - 1, self.width), self.dtype),
            state=jnp.zeros((*batch_shape, self.width, self.state_dim), upcast(self.dtype)),
        )

    def __call__(
        self, x: Float[Array, "*B T D"], layout: Layout | None = None
    ) -> Float[Array, "*B T D"]:
        """The output for a whole sequence; pads (`layout.mask`), left or right, have no effect, nor
        do other segments of a row."""
        cache, layout = self.init_cache(x.shape[:-2], 0), layout or causal_layout(x.shape[-2])
        positions = layout.positions if layout.packed else None
        return self._scan(x, layout.mask, cache, positions)[0]

    def prefill(
        self, x: Float[Array, "*B T D"], cache: MambaCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], MambaCache]:
        """`self(x)`, and the cache after x; `cache` must be empty.

        lengths: real tokens of each right-padded row, None = all T.
        """
        return self.append(x, cache, lengths)

    def append(
        self, x: Float[Array, "*B T D"], cache: MambaCache, lengths: Int[Array, "*B"] | None = None
    ) -> tuple[Float[Array, "*B T D"], MambaCache]:
        """The outputs of T more tokens per row, and the cache after them.

        lengths: real tokens of each right-padded row, 0 to T; None = all T.
        """
        num_tokens, before = x.shape[-2], self.conv_width - 1
        mask = None if lengths is None else prefix_mask(lengths, num_tokens)
        y, seen, state = self._scan(x, mask, cache)
        if lengths is None:
            lengths = jnp.full(x.shape[:-2], num_tokens, jnp.int32)
        # The last real inputs; those before the first token of an empty cache are 0.
        slots = jax.lax.broadcast_to_rank(jnp.arange(before), x.ndim - 1)
        last = lengths[..., None] + slots
        return y, MambaCache(jnp.take_along_axis(seen, last[..., None], axis=-2), state)

    def decode_step(
        self, x: Float[Array, "*B 1 D"], cache: MambaCache
    ) -> tuple[Float[Array, "*B 1 D"], MambaCache]:
        """The output of one more token per row, and the cache after it."""
        value = self.value(x)
        seen = jnp.concatenate([cache.conv, value], axis=-2)
        mixed = short_convolution(seen, self.conv_filter[...].astype(self.dtype))
        mixed = self._activate(mixed)
        v, dt, a, b, c = self._coefficients(mixed)
        y, state = selective_scan(v, dt, a, b, c, cache.state, chunk_size=1)
        return self._leave(x, v, y), MambaCache(seen[..., 1:, :], state)

    def _scan(self, x, mask: Bool[Array, "*B T"] | None, cache: MambaCache, positions=None):
        """The output, the inputs of the convolution with those before x, and the last state.

        positions: of the tokens in their segments, None = a row is one segment.
        """
        value = self.value(x)
        if mask is not None:
            value = jnp.where(mask[..., None], value, 0)
        seen = jnp.concatenate([cache.conv, value], axis=-2)
        mixed = short_convolution(seen, self.conv_filter[...].astype(self.dtype), positions)
        v, dt, a, b, c = self._coefficients(self._activate(mixed))
        if mask is not None:
            dt = jnp.where(mask[..., None], dt, 0)
        starts = None if positions is None else positions == 0
        size = self.chunk_size
        y, state = selective_scan(v, dt, a, b, c, cache.state, chunk_size=size, starts=starts)
        return self._leave(x, v, y), seen, state

    def _activate(self, mixed):
        if self.conv_bias is not None:
            bias = self.conv_bias[...].astype(self.dtype)
            mixed = mixed + jax.lax.broadcast_to_rank(bias, mixed.ndim)
        return jax.nn.silu(mixed)

    def _coefficients(self, v):
        """The inputs of the recurrence and dt, A, B and C, in float32 or wider."""
        dt, b, c = self.dt_down(v), self.b(v), self.c(v)
        if self.norm_epsilon is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        own = upcast(self.dtype)
        dt = jax.nn.softplus(self.dt_up(dt))
        a = -jnp.exp(self.a_log[...].astype(own))
        return v.astype(own), dt, a, b.astype(own), c.astype(own)

    def _leave(self, x, v, y):
        skip = jax.lax.broadcast_to_rank(self.skip[...].astype(v.dtype), v.ndim)
        y = (y + skip * v).astype(self.dtype)
        return self.out(y * jax.nn.silu(self.gate(x)))
