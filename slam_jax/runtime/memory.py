"""Clear errors where memory runs out or would run out."""

import contextlib
import os
from collections.abc import Iterator

import jax

from slam_jax.errors import ConfigError, UserError


class OutOfMemory(UserError):
    """The state, a step or an evaluation needs more memory than there is."""


@contextlib.contextmanager
def explain_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Raises OutOfMemory("`what` does not fit into memory; `remedy`") where memory runs out."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(f"{what} does not fit into memory; {remedy}") from error
        raise


def peak_memory() -> int | None:
    """The most bytes that were in use at once on a device of this process; None where devices do
    not say, as CPUs do not."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(
        (each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each), default=None
    )


def require_memory(num_bytes: int, what: str, advice: str = "") -> None:
    """Raises ConfigError if `num_bytes` exceed the memory of the devices of all processes.

    advice: what else to do.

    Without this check an allocation that is too large can end the process without a message.
    """
    if jax.local_devices()[0].platform == "cpu":  # virtual CPU devices share one memory
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        available = sum(each.get("bytes_limit", num_bytes) for each in stats)
    available *= jax.process_count()
    if num_bytes > available:
        raise ConfigError(
            f"{what} needs {num_bytes / 2**30:,.1f} GiB and there are {available / 2**30:,.1f}; "
            f"{advice}choose smaller sizes or a larger machine"
        )
