"""What the host needs to know before the first computation."""

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from slam_jax.errors import ConfigError, UserError

# Of glibc's malloc.h, and of Linux's mman.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE, _HUGE = 14, 2 << 20


def tune_host() -> None:
    """Keeps compiled programs between runs and memory between steps; called by `train`
    and `evaluate_checkpoint`.

    Compiled programs go to $SLAM_JAX_CACHE_DIR or ~/.cache/slam_jax/xla unless JAX was told of
    another place. XLA:CPU allocates its temporaries anew at every execution, and glibc gives large
    ones back to the system at once, which then clears the same pages again, step after step. Here
    they are kept, in huge pages where Linux has them: a training step of `standard` at the size of
    the `heldout` comparison took 0.76 times as long (2 cores of an AMD EPYC, 2026-11-27:
    python benchmarks/host_memory.py).
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        chosen = pathlib.Path(os.environ.get("SLAM_JAX_CACHE_DIR") or "~/.cache/slam_jax/xla")
        with contextlib.suppress(RuntimeError, OSError):  # no home, or none to write to
            chosen = chosen.expanduser()
            chosen.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(chosen))
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    # Absent on macOS and on Linuxes without glibc, where nothing needs to be done.
    if hasattr(libc, "mallopt"):
        _keep_memory(libc)


def _keep_memory(libc: Any) -> None:
    """Has malloc take all memory from one heap, and never give any of it back."""
    # Threads with heaps of their own map whatever is large anew each time, whatever M_MMAP_MAX is.
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_TOP_PAD, 64 << 20)
    # The heap is made large once and asked to be of huge pages; none is there until it is touched.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if (start := libc.malloc(size)) is not None:
        first = -(-start // _HUGE) * _HUGE
        libc.madvise(first, size - 2 * _HUGE, _MADV_HUGEPAGE)
        libc.free(start)


class OutOfMemory(UserError):
    """The state, a step or an evaluation needs more memory than there is."""


@contextlib.contextmanager
def memory_named(what: str, remedy: str) -> Iterator[None]:
    """Raises OutOfMemory, with what to do, where the memory of host or device runs out."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(f"{what} does not fit into memory; {remedy}") from error
        raise


def require_room(num_bytes: int, what: str) -> None:
    """Raises ConfigError if the devices of all processes together have less memory than that.

    Allocating it would end the process without a word, or after minutes of swapping.
    """
    if jax.local_devices()[0].platform == "cpu":  # its devices share one memory
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        room = sum(each.get("bytes_limit", num_bytes) for each in stats)
    room *= jax.process_count()
    if num_bytes > room:
        raise ConfigError(
            f"{what} needs {num_bytes / 2**30:,.1f} GiB and there are {room / 2**30:,.1f}; "
            "choose smaller sizes or a larger machine"
        )
