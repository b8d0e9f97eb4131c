"""The kind of device that a function is traced for, where the best form depends on it."""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Iterator

import jax

_FOR_ACCELERATORS = contextvars.ContextVar("_FOR_ACCELERATORS", default=False)
_ATTENTION: contextvars.ContextVar[str | None] = contextvars.ContextVar("_ATTENTION", default=None)


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


@functools.cache
def has_tokamax() -> bool:
    """Whether tokamax, a library of kernels for GPUs and TPUs, is installed."""
    return importlib.util.find_spec("tokamax") is not None


@contextlib.contextmanager
def for_accelerators(attention: str | None = None) -> Iterator[None]:
    """Functions traced within it take the form for accelerators, also on a CPU.

    attention: a form of `fused_attention` that every device supports: "xla_chunked", which needs
    tokamax, or "xla". None = what the device at hand supports, the plain form on a CPU.
    """
    tokens = _FOR_ACCELERATORS.set(True), _ATTENTION.set(attention)
    try:
        yield
    finally:
        _FOR_ACCELERATORS.reset(tokens[0])
        _ATTENTION.reset(tokens[1])


def requested_attention() -> str | None:
    """The argument `attention` of the `for_accelerators` in force."""
    return _ATTENTION.get()
