"""The kind of device that a function is traced for, where the best form depends on it."""

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
    """NVIDIA's compute capability of the GPUs of this process (9.0: Hopper); 0 without one."""
    if jax.default_backend() != "gpu":
        return 0.0
    try:
        return float(jax.local_devices()[0].compute_capability)
    except (AttributeError, ValueError):  # a GPU of another vendor
        return 0.0


@contextlib.contextmanager
def for_accelerators() -> Iterator[None]:
    """Functions traced within it take the form for accelerators, also on a CPU."""
    token = _FOR_ACCELERATORS.set(True)
    try:
        yield
    finally:
        _FOR_ACCELERATORS.reset(token)
