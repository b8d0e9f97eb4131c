"""The plan of a run: memory, operations and exchanged bytes of each device."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.data import prepare, training_batches
from slam_jax.planning.compiled import Step, compiled_step, extrapolated
from slam_jax.planning.machine import Machine
from slam_jax.planning.subjects import LanguageRun, SlamV3Run, Subject
from slam_jax.training.experiment import Experiment, as_json, build
from slam_jax.training.mesh import make_mesh
from slam_jax.training.sharding import bytes_per_device, with_shardings


class StateBytes(NamedTuple):
    """Bytes of the training state on each device."""

    params: int
    opt_state: int
    ema: int


class Plan(NamedTuple):
    """Figures of one device for one step.

    sizes: mesh axis -> number of devices. state: exact, from the shardings. step: from the
    executable for virtual CPU devices; other compilers may merge or move collectives and may need
    less memory. flops: floating-point operations. layers: numbers of layers of the models that were
    compiled; one empty entry if the whole model was. view: of the batches, if there are views.
    """

    sizes: Mapping[str, int]
    state: StateBytes
    step: Step
    flops: float
    machine: Machine
    layers: Sequence[Mapping[str, int]]
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


def state_bytes(state: Any, mesh: Mesh | None, zero: bool) -> StateBytes:
    """Bytes per device of a `TrainState` of shapes, sharded over the mesh."""
    state = with_shardings(state, mesh, zero=zero)
    return StateBytes(*map(bytes_per_device, (state.params, state.opt_state, state.ema)))


def plan_step(
    subject: Subject, mesh: Mesh | None, machine: Machine = Machine(), state: Any = None
) -> Plan:
    """The plan of a subject on a mesh. Its step is compiled and not run.

    state: the shapes of `subject.state()`, if the caller has them.

    Raises:
      ConfigError: the devices cannot share the batch evenly.
    """
    subject.require_even(mesh)
    sizes = {"data": 1} if mesh is None else dict(mesh.shape)
    step, layers = extrapolated(subject, functools.partial(compiled_step, mesh=mesh))
    held = state_bytes(state or subject.state()[1], mesh, subject.mesh.zero)
    flops = subject.flops.of_device(sizes, subject.num_heads)
    return Plan(sizes, held, step, flops, machine, layers, subject.view)


def plan(config: ConfigDict | Mapping[str, Any], machine: Machine = Machine()) -> Plan:
    """The plan of a configuration with its own mesh on JAX's devices, which may be virtual ones.

    Raises ConfigError as `train` does.
    """
    subject = subject_of(config)
    return plan_step(subject, make_mesh(subject.mesh), machine)


def subject_of(config: ConfigDict | Mapping[str, Any]) -> Subject:
    """A `LanguageRun` for a configuration with the field `language_model`, else a `SlamV3Run`.

    The data set of a run is built if necessary, since shapes of batches depend on it. Of the views
    that the run trains on the largest is planned: one that the alignment loss encodes twice comes
    first, then the one with the most encoder tokens.
    """
    values = as_json(config)
    if "language_model" in values:
        return build(LanguageRun, values, "")
    experiment, runs = Experiment.from_config(values), []
    dataset = prepare(experiment.data, model=experiment.model)
    for view in experiment.data.views:
        data = dataclasses.replace(experiment.data, stages=((0, {view: 1.0}),))
        _, row = next(training_batches(dataset.train, dataset.tokenizer, data, rows=range(1)))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((experiment.data.batch_size, *x.shape[1:]), x.dtype), row
        )
        runs.append(SlamV3Run(experiment, dataset.tokenizer.vocab_size, batch, view))
    return max(runs, key=lambda run: (run.is_aligned, run.stream_bytes[0]))
