"""What the host needs to know before the first computation."""

import contextlib
import functools
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring

from slam_jax.errors import ConfigError, UserError
from slam_jax.heap import keep_memory, open_holes, plug_holes
from slam_jax.layers.backend import on_cpu


def tune_host() -> None:
    """Keeps compiled programs between runs and memory between steps; called by `train`
    and `evaluate_checkpoint`.

    Compiled programs go to $SLAM_JAX_CACHE_DIR or ~/.cache/slam_jax/xla unless JAX was told of
    another place. XLA:CPU allocates its temporaries anew at every execution, and glibc gives large
    ones back to the system at once, which then clears the same pages again, step after step. Here
    they are kept, in huge pages where Linux has them: a training step of `standard` at the size of
    the `heldout` comparison took 0.76 times as long (2 cores of an AMD EPYC, 2026-11-27, version
    0.8.2: python benchmarks/host_memory.py). A compilation leaves free memory in many small pieces,
    which malloc would search in every operation; they are plugged until the next one.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        chosen = pathlib.Path(os.environ.get("SLAM_JAX_CACHE_DIR") or "~/.cache/slam_jax/xla")
        with contextlib.suppress(RuntimeError, OSError):  # no home, or none to write to
            chosen = chosen.expanduser()
            chosen.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(chosen))
    keep_memory()
    _plug_after_compilations()


# Below these a program leaves little behind.
_LONG_LOWERING, _LONG_COMPILATION = 0.05, 0.5  # seconds


@functools.cache  # listeners stay
def _plug_after_compilations() -> None:
    here = threading.local()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if not on_cpu():
            return
        if event.endswith("/jaxpr_to_mlir_module_duration") and duration_secs > _LONG_LOWERING:
            open_holes()
            here.opened = True
        elif event.endswith("/backend_compile_duration"):
            if getattr(here, "opened", False) or duration_secs > _LONG_COMPILATION:
                plug_holes()
            here.opened = False

    jax.monitoring.register_event_duration_secs_listener(listen)


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
