"""Decoding of one attention layer on its latents against plain keys and values, 64 rows of 4,096.

The layer is that of `deepseek_v2` at its seed size. The plain cache holds the keys and values of
every head, computed once from the same weights, as transformers does; both give the same outputs.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.comparison import Arm, Comparison, Measured

ROOM = 128  # tokens that the cache has room for, in all rounds together


class Sizes(NamedTuple):
    """Of `MultiHeadLatentAttention`."""

    embed_dim: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


SEED = Sizes(512, 16, 128, 32, 16, 32)
LITE = Sizes(2_048, 16, 512, 128, 64, 128)  # DeepSeek-V2-Lite


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    rows, context = (2, 32) if quick else (64, 4_096)
    given = {"rows": rows, "context": context, "sizes": SEED, "dtype": "float32"}
    yield Comparison(
        f"latent attention, one token, {rows} rows of {context:,}",
        [Arm("latents", latents, given), Arm("keys and values", plain, given, aim=3.5)],
        tolerance=1e-4,
        checked=2,
        repeats=5,
        bytes_moved=bytes_read(**given),
    )
    yield Comparison(
        f"its cache, {rows} rows of {context:,}",
        [
            Arm("latents", cache_size, {**given, "of": "latents"}),
            Arm("keys and values", cache_size, {**given, "of": "plain"}, aim=5.0),
        ],
        tolerance=None,
        unchecked="the caches of the row above",
        fresh=True,
        unit="MiB",
    )


def bytes_read(rows: int, context: int, sizes: Sizes, dtype: str) -> float:
    """Bytes of the cached numbers, each read once."""
    numbers = sizes.kv_lora_rank + sizes.qk_rope_head_dim
    return float(np.dtype(dtype).itemsize * rows * context * numbers)


def latents(rows: int, context: int, sizes: Sizes, dtype: str) -> Any:
    """Outputs [rows, 1, D] of one token after `context` tokens."""
    layer, cache, x = _start(rows, context, sizes, dtype)
    return _steps(lambda layer, x, cache: layer.decode_step(x, cache), layer, x, cache)


def plain(rows: int, context: int, sizes: Sizes, dtype: str) -> Any:
    layer, cache, x = _start(rows, context, sizes, dtype)
    import jax

    return _steps(_plain_step, layer, x, jax.jit(_expand)(layer, cache))


def cache_size(rows: int, context: int, sizes: Sizes, dtype: str, of: str) -> Measured:
    """MiB, counted from the shapes."""
    import jax
    from flax import nnx

    def cache():
        layer = _layer(sizes, dtype)
        latent = layer.init_cache((rows,), context)
        return latent if of == "latents" else _expand(layer, latent)

    shapes = jax.tree.leaves(nnx.eval_shape(cache))
    return Measured(None, sum(x.size * x.dtype.itemsize for x in shapes) / 2**20)


def _layer(sizes: Sizes, dtype: str) -> Any:
    from flax import nnx

    from slam_jax.layers.latent_attention import MultiHeadLatentAttention

    given: Any = {**sizes._asdict(), "dtype": dtype, "param_dtype": dtype}
    return MultiHeadLatentAttention(**given, rngs=nnx.Rngs(0))


def _start(rows: int, context: int, sizes: Sizes, dtype: str) -> tuple[Any, Any, Any]:
    """The layer, its cache with random latents in it, and a token a row."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from slam_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    layer = jax.jit(functools.partial(_layer, sizes, dtype))()
    empty = layer.init_cache((rows,), context + ROOM)
    keys = jax.random.split(jax.random.key(0), 3)
    cache = dataclasses.replace(
        empty,
        c_kv=jax.random.normal(keys[0], empty.c_kv.shape, dtype),
        k_rope=jax.random.normal(keys[1], empty.k_rope.shape, dtype),
        length=jnp.full(rows, context),
    )
    return layer, cache, jax.random.normal(keys[2], (rows, 1, sizes.embed_dim), dtype)


def _steps(step: Any, layer: Any, x: Any, cache: Any) -> Any:
    import jax

    run = jax.jit(step, donate_argnums=2)

    def call():
        nonlocal cache
        y, cache = run(layer, x, cache)
        return y

    return call


def _expand(layer: Any, cache: Any) -> Any:
    """The keys [rows, N, T, H + H_r] and values [rows, N, T, V] of all heads."""
    import jax.numpy as jnp

    from slam_jax.layers.kv_cache import KVCache

    k, v = (jnp.swapaxes(x, -2, -3) for x in _heads(layer, cache.c_kv, cache.k_rope))
    return KVCache(k, v, cache.length)


def _heads(layer: Any, c_kv: Any, k_rope: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp

    k = layer.k_up(c_kv)
    shared = jnp.broadcast_to(k_rope[..., None, :], (*k.shape[:-1], k_rope.shape[-1]))
    return jnp.concatenate([k, shared], axis=-1), layer.v_up(c_kv)


def _plain_step(layer: Any, x: Any, cache: Any) -> Any:
    import jax.numpy as jnp

    from slam_jax.layers.attention import attend
    from slam_jax.layers.masks import prefix_mask
    from slam_jax.layers.rotary import rotary

    positions = cache.length[..., None]
    rotate = functools.partial(rotary, positions=positions, rope=layer.rope)
    q = jnp.concatenate([layer.q_nope(x), rotate(layer.q_rope(x))], axis=-1)
    k_rope = rotate(layer.k_rope(x)[..., None, :])[..., 0, :]
    cache = cache.extended(*_heads(layer, layer.kv_norm(layer.kv_down(x)), k_rope))
    mask = prefix_mask(positions + 1, cache.capacity)
    k, v = cache.tokens_first()
    return layer.out(attend(q, k, v, mask)), cache
