"""Causal attention by cuDNN on NVIDIA GPUs, which never stores the scores.

`attend` and `latent_attend` use it where `fits` says so; the result is the same.
Source: Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), section 3.1.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slam_jax.kernels.backend import cuda_capability
from slam_jax.layers.constrain import per_device
from slam_jax.layers.masks import Causal

# The scores of shorter rows need little memory.
_LEAST_TOKENS = 128
# Earlier versions fail under a vmap over only some of the arrays.
_LEAST_JAX = (0, 11, 1)


def fits(q: Float[Array, "*B T N H"], width: int) -> bool:
    """Whether cuDNN supports these queries with keys and values of `width` features, and the rows
    are long enough to gain from it."""
    capability = cuda_capability()
    return (
        jax.__version_info__ >= _LEAST_JAX
        and capability >= 8.0
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.size > 0
        and q.shape[-3] >= _LEAST_TOKENS
        and width % 8 == 0
        # Some GPUs after Hopper support no more.
        and width <= (256 if 9.0 <= capability < 10.0 else 128)
    )


def causal_attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K H_v"],
    mask: Causal,
    *,
    scale: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "*B T N H_v"]:
    """Attention of each token to itself and to those before it (in its window).

    N is a multiple of K. scale: factor of the scores, None = H^-0.5.
    implementation: "cudnn", or "xla", the plain twin for any device.
    """
    width, values = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # cuDNN needs one width for all, and JAX an even number of tokens for a gradient. Zeros add
    # nothing to scores, and no token attends to the one added at the end.
    tokens, odd = q.shape[-3], q.shape[-3] % 2
    q, k, v = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, odd), (0, 0), (0, width - x.shape[-1])])
        for x in (q, k, v)
    )
    # One group per key head, so that all three arrays are divided alike over devices.
    num_groups = k.shape[-2]
    grouped = q.reshape(*q.shape[:-2], num_groups, q.shape[-2] // num_groups, width)
    names = (*("batch", *[None] * q.ndim)[: q.ndim - 3], None, "head")

    def here(q, k, v):
        shape, q = q.shape, q.reshape(*q.shape[:-3], -1, q.shape[-1])
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        y = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation=implementation,
        )
        return y.reshape(shape)

    y = per_device(here, (grouped, k, v), (names, names, names))
    return y.reshape(q.shape)[..., :tokens, :, :values]
