"""What a run would take of each device, told without allocating any of it."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from slam_jax.data import Batch, prepare, training_batches
from slam_jax.layers.constrain import AXES, fit
from slam_jax.training.collectives import collectives
from slam_jax.training.experiment import Experiment
from slam_jax.training.mesh import make_mesh
from slam_jax.training.sharding import bytes_per_device, in_force
from slam_jax.training.start import jit_step, require_even, state_shapes


class Plan(NamedTuple):
    """All in bytes, of one device.

    sizes: axis -> devices along it. params, opt_state, ema: exact, from the shardings.
    step: what XLA:CPU takes beside for a step, activations most of all; elsewhere an estimate.
    sent: (axes, operation) -> what a step exchanges along these axes, in the program as compiled
    for as many CPU devices; other compilers may merge some of it.
    """

    sizes: Mapping[str, int]
    params: int
    opt_state: int
    ema: int
    step: int
    sent: Mapping[tuple[tuple[str, ...], str], int]

    @property
    def total(self) -> int:
        return self.params + self.opt_state + self.ema + self.step

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        rows = {
            "parameters, exact": self.params,
            "optimizer, exact": self.opt_state,
            "average, exact": self.ema,
            "a step, by XLA:CPU": self.step,
            "in all": self.total,
        }
        for (axes, op), num_bytes in sorted(self.sent.items()):
            rows[f"{op} along {', '.join(axes)}, as compiled for CPUs"] = num_bytes
        lines = [f"{what:<56}{num_bytes / 2**20:>14,.3f} MiB" for what, num_bytes in rows.items()]
        return "\n".join([f"{mesh}: on each of {math.prod(self.sizes.values())} devices", *lines])


def plan(config: ConfigDict | Mapping[str, Any]) -> Plan:
    """The plan of a run on the devices that JAX has; they may be virtual ones.

    The data set is built where it is not there yet: shapes of a batch depend on it. The batch is
    the first one. Raises ConfigError as `train` does.
    """
    experiment = Experiment.from_config(config)
    mesh = make_mesh(experiment.mesh)
    require_even(experiment, mesh)
    dataset = prepare(experiment.data, model=experiment.model)
    _, batch = next(training_batches(dataset.train, dataset.tokenizer, experiment.data))
    return plan_step(experiment, dataset.tokenizer.vocab_size, batch, mesh)


def plan_step(experiment: Experiment, vocab_size: int, batch: Batch, mesh: Mesh | None) -> Plan:
    """The plan of steps on batches like this one; the step is compiled, and not run."""
    sizes = {"data": 1} if mesh is None else dict(mesh.shape)

    def like(x: Any) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        sharding = NamedSharding(mesh, fit(x.shape, [AXES["batch"]], sizes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with in_force(mesh):
        graphdef, state = state_shapes(experiment, vocab_size, mesh)
        step = jit_step(experiment, graphdef, state)
        compiled = step.lower(state, jax.tree.map(like, batch)).compile()
    memory, sent = compiled.memory_analysis(), Counter()
    for each in collectives(compiled.as_text(), sizes):
        sent[each.axes, each.op] += each.count * each.num_bytes
    return Plan(
        sizes=sizes,
        params=bytes_per_device(state.params),
        opt_state=bytes_per_device(state.opt_state),
        ema=bytes_per_device(state.ema),
        step=memory.temp_size_in_bytes,
        sent=dict(sent),
    )
