"""The machine and its versions, and what a process measures of itself: seconds and bytes."""

import contextlib
import hashlib
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from slam_jax.version import __version__


def code_version() -> str:
    """The version of the code, and the first digits of a hash of all its sources on the disk."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:12]})"


def describe_machine() -> dict[str, Any]:
    """Processor, device, memory and versions."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    has_affinity = hasattr(os, "sched_getaffinity")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "slam_jax": __version__,
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    """The name of the processor, if the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
    with contextlib.suppress(OSError, StopIteration):
        # On Linux `ru_maxrss` is at least that of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
