"""For what kind of device a program is traced, where the best form depends on it."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax

_FOR_ACCELERATORS = contextvars.ContextVar("_FOR_ACCELERATORS", default=False)


def on_cpu() -> bool:
    return jax.default_backend() == "cpu" and not _FOR_ACCELERATORS.get()


@functools.cache
def cuda_capability() -> float:
    """What the GPUs of this process can do, as NVIDIA counts it (9.0: Hopper); 0 without one."""
    if jax.default_backend() != "gpu":
        return 0.0
    try:
        return float(jax.local_devices()[0].compute_capability)
    except (AttributeError, ValueError):  # of another maker
        return 0.0


@contextlib.contextmanager
def for_accelerators() -> Iterator[None]:
    """Within it a program is traced as for an accelerator, also on a CPU that stands for one."""
    token = _FOR_ACCELERATORS.set(True)
    try:
        yield
    finally:
        _FOR_ACCELERATORS.reset(token)
