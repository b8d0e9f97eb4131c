"""Seconds and bytes that a process measures of itself."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and number of repeated measurements."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "n": len(values),
    }


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls until their result is ready, after one warm-up call."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """A jitted function compiled for these arguments, and the seconds of tracing and compiling,
    without reading or filling the compilation cache."""
    before = jax.config.values["jax_enable_compilation_cache"]
    _use_cache(False)
    try:
        start = time.perf_counter()
        return function.lower(*args).compile(), time.perf_counter() - start
    finally:
        _use_cache(before)


def _use_cache(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()  # JAX reads the option only once


def peak_memory() -> int:
    """Peak bytes: of the device if it reports them, else of this process since it started."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
