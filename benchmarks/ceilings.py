"""The fastest matrix products and copies of any library on this machine, in float32 on a CPU and in
bfloat16 on a GPU.

A share of them can exceed 100%: a benchmark that reads what is in the cache is faster than a copy.
"""

import statistics
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from benchmarks.comparison import Arm
from benchmarks.device import on_gpu, torch_device
from benchmarks.worker import Worker

_LIBRARIES = {"xla": "jax", "torch": "torch"}
_REPEATS = 5


def measure_ceilings(
    quick: bool, libraries: Collection[str] = _LIBRARIES, start: Callable[..., Any] = Worker
) -> dict[str, Any]:
    """Operations per second of [n, n] @ [n, n], bytes per second read and written by a copy, and
    the library of each. start: as in `benchmarks.harness.measure`."""
    size, count, dtype = (8_192, 1 << 29, "bfloat16") if on_gpu() else (3_072, 1 << 26, "float32")
    if quick:
        size, count = 256, 1 << 20
    product, copy = {"n": size, "dtype": dtype}, {"n": count}
    builders = {
        ("matmul", "xla"): (_xla_matmul, 2.0 * size**3, product),
        ("matmul", "torch"): (_torch_matmul, 2.0 * size**3, product),
        ("copy", "xla"): (_xla_copy, 8.0 * count, copy),
        ("copy", "torch"): (_torch_copy, 8.0 * count, copy),
    }
    rates: dict[str, dict[str, float]] = {"matmul": {}, "copy": {}}
    for (what, library), (build, amount, given) in builders.items():
        arm = Arm(library, build, given, needs=[_LIBRARIES[library]])
        if library not in libraries or arm.missing():
            continue
        worker = start(arm, checked=0)
        try:
            worker.receive()
            rates[what][library] = amount / statistics.median(worker.seconds(_REPEATS))
        finally:
            worker.end()
    best = {what: max(found, key=lambda name: found[name]) for what, found in rates.items()}
    return {
        "matmul_flops": rates["matmul"][best["matmul"]],
        "matmul_by": best["matmul"],
        "matmul_size": size,
        "matmul_dtype": dtype,
        "copy_bytes": rates["copy"][best["copy"]],
        "copy_by": best["copy"],
        "copy_array_bytes": 4 * count,
    }


def _xla_matmul(n: int, dtype: str) -> Any:
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(_matrix(n), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(x, x)


def _torch_matmul(n: int, dtype: str) -> Any:
    from benchmarks.theirs import torch

    x = torch().from_numpy(_matrix(n)).to(torch_device(torch()), getattr(torch(), dtype))
    y = x.clone()
    return lambda: torch().mm(x, x, out=y)


def _xla_copy(n: int) -> Any:
    import jax
    import jax.numpy as jnp

    from slam_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    x = jnp.ones(n, jnp.float32)
    # Returning the argument would copy nothing; a new array each time would have to be cleared.
    copy = jax.jit(lambda x, i: x + i, donate_argnums=0)

    def call():
        nonlocal x
        x = copy(x, jnp.float32(1))
        return x

    return call


def _torch_copy(n: int) -> Any:
    from benchmarks.theirs import torch

    place = torch_device(torch())
    x, y = torch().ones(n, device=place), torch().zeros(n, device=place)
    return lambda: y.copy_(x)


def _matrix(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, n), np.float32)
