"""Seconds and bytes, as honestly as a process can measure its own."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache


class Timing(NamedTuple):
    """Seconds of `n` repetitions."""

    median: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def as_json(self) -> dict[str, float]:
        return dict(self._asdict())


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of so many calls, waited for; one goes before them and is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """A jitted function compiled for such arguments, and the seconds it took, traces and all; no
    cache of programs is asked or filled."""
    before = jax.config.values["jax_enable_compilation_cache"]
    _use_cache(False)
    try:
        start = time.perf_counter()
        return function.lower(*args).compile(), time.perf_counter() - start
    finally:
        _use_cache(before)


def _use_cache(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    # JAX looks at it once.
    compilation_cache.reset_cache()


def peak_memory() -> int:
    """Bytes: of the device where it tells, else the most this process has ever had."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
