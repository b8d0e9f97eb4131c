"""The plan of a run: memory, operations and exchanged bytes of each device."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.planning.compiled import Step, compiled_step, extrapolated
from slam_jax.planning.machine import Machine
from slam_jax.planning.subjects import Subject, subject_of
from slam_jax.training.mesh import make_mesh
from slam_jax.training.sharding import bytes_per_device, with_shardings


class StateBytes(NamedTuple):
    """Bytes of the training state on each device. params: of those that train."""

    params: int
    opt_state: int
    ema: int
    frozen: int = 0


class Plan(NamedTuple):
    """Figures of one device for one step.

    sizes: mesh axis -> number of devices. state: from the shardings. step: from the executable for
    virtual CPU devices. flops: floating-point operations. layers: numbers of layers of the models
    that were compiled; one empty entry if the whole model was. view: of the batches, if any.
    """

    sizes: Mapping[str, int]
    state: StateBytes
    step: Step
    flops: float
    machine: Machine
    layers: Sequence[Mapping[str, int]] = ()
    view: str | None = None

    @property
    def needed(self) -> int:
        """State, gradients and activations; gathered and recomputed arrays come on top."""
        return sum(self.state) + self.state.params + self.step.activations

    @property
    def taken(self) -> int:
        """State and temporary memory of the executable for CPUs."""
        return sum(self.state) + self.step.taken

    def share(self, num_bytes: int) -> float:
        """The share of a device's memory."""
        return num_bytes / (self.machine.device_memory_gib * 2**30)

    @property
    def exceeding(self) -> int:
        """How many of `needed` and `taken` exceed a device's memory: 0 fits, 1 may fit."""
        return sum(self.share(num_bytes) > 1 for num_bytes in (self.needed, self.taken))

    @property
    def seconds(self) -> dict[str, float]:
        """The parts of a step's time, without any overlap."""
        parts = {"compute": self.flops / (self.machine.device_tflops * 1e12)}
        for (axes, op), time in sorted(self.machine.seconds(self.step.sent, self.sizes).items()):
            parts[f"{op} along {', '.join(axes)}" if axes else op] = time
        return parts

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def state_bytes(subject: Subject, mesh: Mesh | None) -> StateBytes:
    """Bytes per device of a subject's state on a mesh."""
    state: Any = with_shardings(subject.state[1], mesh, zero=subject.mesh.zero)
    return StateBytes(
        *map(bytes_per_device, (state.params, state.opt_state, state.ema, state.frozen))
    )


def plan_step(subject: Subject, mesh: Mesh | None, machine: Machine = Machine()) -> Plan:
    """The plan of a subject on a mesh. Its step is compiled and not run.

    Raises:
      ConfigError: the devices cannot share the batch evenly.
    """
    subject.require_even(mesh)
    sizes = {"data": 1} if mesh is None else dict(mesh.shape)
    step, layers = extrapolated(subject, functools.partial(compiled_step, mesh=mesh))
    flops = subject.flops_of_device(sizes)
    return Plan(sizes, state_bytes(subject, mesh), step, flops, machine, layers, subject.view)


def plan(config: ConfigDict | Mapping[str, Any], machine: Machine = Machine()) -> Plan:
    """The plan of a configuration with its own mesh on JAX's devices, which may be virtual ones.

    Raises ConfigError as `train` does.
    """
    subject = subject_of(config)
    return plan_step(subject, make_mesh(subject.mesh, subject.num_processes), machine)
