"""Causal attention that never makes its scores: cuDNN's, on GPUs of NVIDIA.

Source: Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), section 3.1. `attend` and
`latent_attend` choose it by themselves where it fits; what they compute is the same.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slam_jax.kernels.backend import cuda_capability
from slam_jax.layers.constrain import per_device
from slam_jax.layers.masks import Causal

# The scores of shorter rows are small.
_LEAST_TOKENS = 128
# Before it, a vmap over only some of its arrays fails.
_LEAST_JAX = (0, 11, 1)


def fits(q: Float[Array, "*B T N H"], width: int) -> bool:
    """Whether cuDNN takes such queries with keys and values of `width` features, and the rows are
    long enough for it."""
    capability = cuda_capability()
    return (
        jax.__version_info__ >= _LEAST_JAX
        and capability >= 8.0
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.size > 0
        and q.shape[-3] >= _LEAST_TOKENS
        and width % 8 == 0
        # Of what came after Hopper not all take more.
        and width <= (256 if 9.0 <= capability < 10.0 else 128)
    )


def causal_attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K V"],
    mask: Causal,
    *,
    scale: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "*B T N V"]:
    """Attention of each token to itself and to those before it (in its window); N a multiple of K.
    scale: of the scores, None = H^-0.5.

    implementation: "cudnn", or "xla", its plain twin, anywhere.
    """
    width, values = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # It wants one width for all, and JAX an even number of tokens where there is a gradient. Zeros
    # add nothing to scores, and nobody attends to a token after the last.
    tokens, odd = q.shape[-3], q.shape[-3] % 2
    q, k, v = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, odd), (0, 0), (0, width - x.shape[-1])])
        for x in (q, k, v)
    )
    # As many groups as there are heads of keys: all three are divided alike over devices.
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
