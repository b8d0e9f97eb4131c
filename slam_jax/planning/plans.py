"""What a run would take of each device, told without allocating any of it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.data import Dataset, prepare, training_batches
from slam_jax.planning.compiled import Step, compiled_step, extrapolated
from slam_jax.planning.machine import Machine
from slam_jax.planning.subjects import LanguageRun, SlamV3Run, Subject
from slam_jax.training.experiment import Experiment, as_json, build
from slam_jax.training.mesh import make_mesh
from slam_jax.training.sharding import bytes_per_device, laid_out


class StateBytes(NamedTuple):
    """On each device."""

    params: int
    opt_state: int
    ema: int


class Plan(NamedTuple):
    """Of one device; bytes and floating-point operations of a step.

    sizes: axis -> devices along it. state: exact, from the shardings. step: from the program as it
    is compiled for as many CPU devices; other compilers may merge or move some of what it sends,
    and mind memory more than this one does.
    layers: with how many layers of which kind the programs were, from which it is extrapolated;
    one empty entry where the whole model was compiled. view: of the batches, None for text alone.
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
        """What stands at the end of a forward pass, and the gradients; the weights that layers
        gather, and what they make anew, come on top of it."""
        return sum(self.state) + self.state.params + self.step.activations

    @property
    def taken(self) -> int:
        """The same with all that XLA:CPU has at once, which does not put off what takes memory."""
        return sum(self.state) + self.step.taken

    def share(self, num_bytes: int) -> float:
        """Of the memory of a device."""
        return num_bytes / (self.machine.device_memory_gib * 2**30)

    @property
    def exceeding(self) -> int:
        """How many of these two are more than a device has; with one it depends on the compiler."""
        return sum(self.share(num_bytes) > 1 for num_bytes in (self.needed, self.taken))

    @property
    def seconds(self) -> dict[str, float]:
        """What a step is made of, if nothing overlaps."""
        told = {"compute": self.flops / (self.machine.device_tflops * 1e12)}
        times = self.machine.seconds(self.step.sent, self.sizes)
        for (axes, op), time in sorted(times.items()):
            name = f"{op} along {', '.join(axes)}" if axes else op
            told[name] = told.get(name, 0.0) + time
        return told

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def state_bytes(state: Any, mesh: Mesh | None, zero: bool) -> StateBytes:
    """Of a `TrainState` of shapes."""
    state = laid_out(state, mesh, zero=zero)
    parts = (state.params, state.opt_state, state.ema)
    return StateBytes(*map(bytes_per_device, parts))


def plan_step(
    subject: Subject, mesh: Mesh | None, machine: Machine = Machine(), state: Any = None
) -> Plan:
    """The plan of a subject on a mesh; its step is compiled, and not run.

    state: the shapes of `subject.state()`, if somebody has them.

    Raises ConfigError where the devices cannot share the batch evenly.
    """
    subject.require_even(mesh)
    sizes = {"data": 1} if mesh is None else dict(mesh.shape)
    step, layers = extrapolated(subject, functools.partial(compiled_step, mesh=mesh))
    return Plan(
        sizes=sizes,
        state=state_bytes(state or subject.state()[1], mesh, subject.mesh.zero),
        step=step,
        flops=subject.flops.of_device(sizes, subject.num_heads),
        machine=machine,
        layers=layers,
        view=subject.view,
    )


def plan(config: ConfigDict | Mapping[str, Any], machine: Machine = Machine()) -> Plan:
    """The plan of a run on the devices that JAX has, with the config's own mesh; they may be
    virtual ones. Raises ConfigError as `train` does."""
    subject = subject_of(config)
    return plan_step(subject, make_mesh(subject.mesh), machine)


def subject_of(config: ConfigDict | Mapping[str, Any]) -> Subject:
    """What a config is of: with `language_model` in it a `LanguageRun`, else a run of `train`.

    The data set of a run is built where it is not there yet: shapes of a batch depend on it. Of the
    views that it trains on the largest is taken: the one of most stream tokens, and first those
    whose text and image are encoded once more for the alignment loss.
    """
    values = as_json(config)
    if "language_model" in values:
        return build(LanguageRun, values, "")
    experiment = Experiment.from_config(values)
    dataset = prepare(experiment.data, model=experiment.model)
    runs = [_run_of(experiment, dataset, view) for view in experiment.data.views]
    return max(runs, key=lambda run: (run.aligned, run.stream_bytes[0]))


def _run_of(experiment: Experiment, dataset: Dataset, view: str) -> SlamV3Run:
    data = dataclasses.replace(experiment.data, stages=((0, {view: 1.0}),))
    rows = range(1)  # all are of one shape
    _, one = next(training_batches(dataset.train, dataset.tokenizer, data, rows=rows))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((data.batch_size, *x.shape[1:]), x.dtype), one
    )
    return SlamV3Run(experiment, dataset.tokenizer.vocab_size, batch, view)
