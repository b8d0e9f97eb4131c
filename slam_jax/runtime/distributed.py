"""Several processes of one run, on one host or on many, by `jax.distributed`.

Every process runs the same code and sees the same workdir; the first process alone writes logs,
metrics and small files.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from slam_jax.errors import ConfigError, UserError, first_line
from slam_jax.runtime.signals import PeerLost

HEARTBEAT_S = 10  # seconds without a heartbeat after which a process counts as lost


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process part of a run. Call it before anything asks JAX for devices.

    None is read from the environment: of Slurm, Open MPI, Kubernetes or a TPU slice, or
    $JAX_COORDINATOR_ADDRESS. Raises ConfigError where a value is not found or the other processes
    cannot be reached.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"could not join the other processes ({first_line(error)}); give every process the "
            "same --coordinator=HOST:PORT and --num_processes=N, and its own --process_id=I"
        ) from error


def is_first_process() -> bool:
    """Whether this is the process that logs and writes."""
    return jax.process_index() == 0


def run_on_first(action: Callable[[], Any]) -> Any:
    """Runs `action` in the first process. All wait for its result, which JSON must be able to hold,
    and return it; a UserError of `action` is raised in all of them."""
    if jax.process_count() == 1:
        return action()
    text, failure = b"", None
    if is_first_process():
        try:
            result = {"value": action()}
        except UserError as error:
            result, failure = {"error": str(error)}, error
        text = json.dumps(result).encode()
    with explain_lost_peers():
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        text = np.frombuffer(text.ljust(size), np.uint8)
        text = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8))
    result = json.loads(text)
    if "error" in result:
        raise failure or UserError(result["error"])
    return result["value"]


@contextlib.contextmanager
def explain_lost_peers() -> Iterator[None]:
    """Raises PeerLost where JAX fails because another process is gone."""
    try:
        yield
    except UserError:  # its message may contain any of the words below
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Each transport has its own message: TCP, NCCL, the coordinator.
        words = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "Connection", "Barrier")
        if jax.process_count() == 1 or not any(word in str(error) for word in words):
            raise
        raise PeerLost(f"another process of the run is gone ({first_line(error)})") from error


def to_host(tree: Any) -> Any:
    """The arrays of a tree as whole NumPy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
