"""The kind of device that a function is traced for, where the best form depends on it."""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Iterator

import jax

# Whether functions are traced for a CPU; None = for the devices of this process.
_FOR_CPU: contextvars.ContextVar[bool | None] = contextvars.ContextVar("_FOR_CPU", default=None)
_ATTENTION: contextvars.ContextVar[str | None] = contextvars.ContextVar("_ATTENTION", default=None)
_PORTABLE = contextvars.ContextVar("_PORTABLE", default=False)


def on_cpu() -> bool:
    for_cpu = _FOR_CPU.get()
    return jax.default_backend() == "cpu" if for_cpu is None else for_cpu


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
    tokens = _FOR_CPU.set(False), _ATTENTION.set(attention)
    try:
        yield
    finally:
        _FOR_CPU.reset(tokens[0])
        _ATTENTION.reset(tokens[1])


@contextlib.contextmanager
def for_export(*, cpu: bool) -> Iterator[None]:
    """Functions traced within it run on other machines: they have no kernels of libraries, and the
    forms for a CPU, or else those for accelerators, whatever device is at hand."""
    tokens = _FOR_CPU.set(cpu), _PORTABLE.set(True)
    try:
        yield
    finally:
        _FOR_CPU.reset(tokens[0])
        _PORTABLE.reset(tokens[1])


def portable() -> bool:
    """Whether `for_export` is in force."""
    return _PORTABLE.get()


def requested_attention() -> str | None:
    """The argument `attention` of the `for_accelerators` in force."""
    return _ATTENTION.get()
