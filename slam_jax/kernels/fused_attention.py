"""Attention by kernels of GPUs and TPUs, which never store the scores.

`attend` and `latent_attend` use them where `kernel_of` names one; the result is the same.
Source: Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), section 3.1.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from slam_jax.kernels.backend import cuda_capability, has_tokamax, portable, requested_attention
from slam_jax.layers.constrain import per_device
from slam_jax.layers.masks import Causal, Mask
from slam_jax.layers.precision import upcast

# The scores of fewer pairs of tokens need little memory.
_LEAST_PAIRS = 128 * 128
# Earlier versions fail under a vmap over only some of the arrays.
_LEAST_JAX = (0, 11, 1)


def kernel_of(q: Float[Array, "*B T N H"], num_keys: int, width: int, mask: Mask) -> str | None:
    """The kernel for these queries, with keys and values of at most `width` features a head.

    "tokamax" where it is installed, else "cudnn" where `jax.nn` has a kernel; what
    `for_accelerators` asks for. None = the plain form: on a CPU, in an export, in float64, and for
    few pairs of tokens or a single query, as in a decoding step.
    """
    if q.size == 0 or q.shape[-3] == 1 or q.shape[-3] * num_keys < _LEAST_PAIRS:
        return None
    if (requested := requested_attention()) is not None:
        return requested
    if portable() or jax.default_backend() == "cpu" or upcast(q.dtype) != jnp.float32:
        return None
    if has_tokamax():
        return "tokamax"
    return "cudnn" if _cudnn_fits(q, num_keys, width, mask) else None


def _cudnn_fits(q, num_keys: int, width: int, mask: Mask) -> bool:
    capability = cuda_capability()
    return (
        jax.__version_info__ >= _LEAST_JAX
        and capability >= 8.0
        and q.dtype in (jnp.bfloat16, jnp.float16)
        # An array, which an added key would need too, becomes a bias, and that is slow.
        and (isinstance(mask, Causal) or (mask is None and num_keys % 2 == 0))
        and width % 8 == 0
        # Some GPUs after Hopper support no more.
        and width <= (256 if 9.0 <= capability < 10.0 else 128)
    )


def fused_attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H_v"],
    mask: Mask,
    kernel: str,
    *,
    scale: float | None = None,
) -> Float[Array, "*B T N H_v"]:
    """The attention of `attend` by the kernel that `kernel_of` names.

    scale: factor of the scores, None = H^-0.5.
    """
    options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5 if scale is None else scale}
    on_tpu, of_jax = jax.default_backend() == "tpu", kernel in ("cudnn", "xla")
    num_queries, num_keys, values = q.shape[-3], k.shape[-3], v.shape[-1]
    if isinstance(mask, Causal) and mask.window is not None and on_tpu:
        mask = mask.array(num_queries)  # tokamax has windows on GPUs only
    # cuDNN needs an even number of tokens for a gradient and one width for all. Kernels of tokamax
    # need whole blocks, on GPUs where there is a mask, and then a row of it for each query. Zeros
    # add nothing to scores, and no token attends to the added ones.
    has_array = not (mask is None or isinstance(mask, Causal))
    block = 2 if of_jax else 128 if on_tpu else 64 if has_array else 1
    more_queries, more_keys = -num_queries % block, -num_keys % block
    width = max(q.shape[-1], values) if of_jax else 0
    q, k, v = (_pad(x, n, width) for x, n in ((q, more_queries), (k, more_keys), (v, more_keys)))
    if mask is None and more_keys:
        mask = jnp.ones((1, num_keys), bool)
    masks, seen = (), None
    if isinstance(mask, Causal):
        options["is_causal"] = True
        if mask.window is not None:
            options["local_window_size"] = (mask.window - 1, 0)
    elif mask is not None:
        mask = jax.lax.broadcast_to_rank(mask, q.ndim - 1)
        if not of_jax:
            mask = jnp.broadcast_to(mask, (*mask.shape[:-2], num_queries, num_keys))
        more = 0 if mask.shape[-2] == 1 else more_queries
        mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(0, more), (0, more_keys)])
        # The libraries give a row without keys the mean of the values, with a gradient, or NaN. So
        # it attends to all keys, and its output is replaced by zeros.
        seen = mask.any(axis=-1, keepdims=True)
        masks = (mask | ~seen,)
    y = _run(kernel, options, q, k, v, masks)
    y = y if seen is None else jnp.where(seen[..., None], y, 0)
    return y[..., :num_queries, :, :values]


def _run(
    kernel: str,
    options: dict[str, Any],
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H_v"],
    masks: tuple[Bool[Array, "*#B #T S"], ...],
) -> Float[Array, "*B T N H_v"]:
    """The library's function on flat rows; each device of a mesh has its own rows and heads.

    masks: one, or none.
    """
    # One group per key head, so that all three arrays are divided alike over devices.
    num_groups = k.shape[-2]
    grouped = q.reshape(*q.shape[:-2], num_groups, q.shape[-2] // num_groups, q.shape[-1])
    rows = ("batch", *[None] * q.ndim)[: q.ndim - 3]
    names = (*rows, None, "head")

    def here(q, k, v, *masks):
        shape, q = q.shape[:-1], q.reshape(*q.shape[:-3], -1, q.shape[-1])
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        named = options
        for mask in masks:
            if math.prod(mask.shape[:-2]) > 1:
                mask = jnp.broadcast_to(mask, (*shape[:-3], *mask.shape[-2:]))
            named = {**options, "mask": mask.reshape(-1, 1, *mask.shape[-2:])}
        return _library(kernel)(q, k, v, **named).reshape(*shape, v.shape[-1])

    y = per_device(here, (grouped, k, v, *masks), (names, names, names, *[rows for _ in masks]))
    return y.reshape(*q.shape[:-1], v.shape[-1])


def _pad(x: Float[Array, "*B T N H"], tokens: int, width: int) -> Float[Array, "*B U N W"]:
    """x with so many more tokens, and with at least `width` features."""
    wider = max(width - x.shape[-1], 0)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, tokens), (0, 0), (0, wider)])


def _library(kernel: str) -> Callable[..., jax.Array]:
    """The function of the library that has this kernel; both take the same arguments."""
    if kernel in ("cudnn", "xla"):
        return functools.partial(jax.nn.dot_product_attention, implementation=kernel)
    kernels: Any = kernel
    if kernel == "tokamax":
        # On GPUs before Hopper "mosaic" has no gradient. The first one that supports the arrays is
        # taken; without a choice the last would be a form that stores the scores.
        mosaic = ("mosaic",) if jax.default_backend() == "tpu" or cuda_capability() >= 9 else ()
        kernels = (*mosaic, "triton", "xla_chunked")
    tokamax: Any = importlib.import_module("tokamax")
    return functools.partial(tokamax.dot_product_attention, implementation=kernels)
