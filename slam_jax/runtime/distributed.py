"""Several processes that are one run, on one host or on many: who writes, what all agree on.

The runtime is that of JAX (`jax.distributed`); every process runs the same program, and whatever is
said of a workdir holds for one that all of them see.
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

HEARTBEAT_S = 10
"""After so long without a sign of life a process counts as dead, and the others end."""


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of a run; to be called before anything else asks JAX for devices.

    What is None is found in the environment: that of Slurm, Open MPI, Kubernetes or a TPU slice, or
    $JAX_COORDINATOR_ADDRESS.

    Raises ConfigError where it is not found, or the others cannot be reached.
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
            f"could not join the other processes ({first_line(error)}); give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I, the same but for the last "
            "on all of them"
        ) from error


def is_first() -> bool:
    """Whether this is the process that logs and writes what is written once."""
    return jax.process_index() == 0


def by_first(action: Callable[[], Any]) -> Any:
    """What `action` returns in the first process, in all of them: something that JSON can hold.

    All wait for it. A UserError that it raises there is raised everywhere.
    """
    if jax.process_count() == 1:
        return action()
    told, failure = None, None
    if is_first():
        try:
            told = {"value": action()}
        except UserError as error:
            told, failure = {"error": str(error)}, error
    told = _from_first(told)
    if failure is not None:
        raise failure
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def _from_first(value: Any) -> Any:
    text = json.dumps(value).encode() if is_first() else b""
    with losses_named():
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        text = np.frombuffer(text.ljust(size), np.uint8)
        text = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8))
    return json.loads(text)


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Raises PeerLost where JAX fails because another process is gone."""
    try:
        yield
    except UserError:  # which may hold any of the words below
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # By whatever way of talking the processes have: over TCP, NCCL, the coordinator.
        named = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "Connection", "Barrier")
        if jax.process_count() == 1 or not any(name in str(error) for name in named):
            raise
        raise PeerLost(f"another process of the run is gone ({first_line(error)})") from error


def to_host(tree: Any) -> Any:
    """Arrays as numpy, whole in every process, wherever their parts are."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
