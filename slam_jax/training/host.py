"""What the host needs to know before the first computation."""

import contextlib
import ctypes
import os
import pathlib

import jax

from slam_jax.errors import ConfigError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_host() -> None:
    """Keeps compiled programs between runs and memory between steps; called by `train`.

    Compiled programs go to $SLAM_JAX_CACHE_DIR or ~/.cache/slam_jax/xla unless JAX was told of
    another place. XLA:CPU allocates its temporaries anew at every execution; glibc gives large ones
    back to the system at once, which then clears the same pages again, step after step. Kept, a
    gated MLP's gradient took 0.68 times as long (2 cores of an AMD EPYC, 2026-11-23:
    python benchmarks/host_memory.py).
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        chosen = pathlib.Path(os.environ.get("SLAM_JAX_CACHE_DIR") or "~/.cache/slam_jax/xla")
        with contextlib.suppress(RuntimeError, OSError):  # no home, or none to write to
            chosen = chosen.expanduser()
            chosen.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(chosen))
    # Absent on macOS and on Linuxes without glibc, where nothing needs to be done.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 64 << 20)


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
