"""Compares a plan with its run: bytes of one of eight virtual devices.

    python benchmarks/plan.py

The run is the quickstart's, on data 2 x process 4. Its state is initialised, one step is taken, and
the arrays that are placed on a device are counted. The step is compiled as a run compiles it.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path
from typing import Any

import jax
import numpy as np

from slam_jax.planning.plans import plan_step
from slam_jax.planning.subjects import subject_of
from slam_jax.training import override, read_config
from slam_jax.training.kinds import task_of
from slam_jax.training.mesh import make_mesh
from slam_jax.training.sharding import place, use_mesh
from slam_jax.training.start import compile_step, initial_state, jit_step, temporary_bytes

CONFIG = Path(__file__).parents[1] / "configs" / "slam_v3_quickstart.py"


def main() -> None:
    config = override(read_config(CONFIG), ["--config.model.dtype=float32"])
    subject, task = subject_of(config), task_of(config)
    mesh = make_mesh(subject.mesh, subject.num_processes)
    planned = plan_step(subject, mesh)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), subject.batch)
    with use_mesh(mesh):
        graphdef, state = initial_state(task, subject.config.vocab_size, mesh)
        batch = place(batch, mesh, task.experiment.data.batch_size)
        step = jit_step(task, graphdef, state)
        taken = temporary_bytes(*compile_step(step, state, batch))
        state, _ = step(state, batch)
    rows = {
        "parameters": (planned.state.params, on_one_device(state.params)),
        "optimizer": (planned.state.opt_state, on_one_device(state.opt_state)),
        "average": (planned.state.ema, on_one_device(state.ema)),
        "temporary, in a step": (planned.step.taken, taken),
    }
    print(f"{'':<20}{'the plan':>14}{'the run':>14}  plan / run")
    for name, (expected, real) in rows.items():
        print(f"{name:<20}{expected:>14,}{real:>14,}  {expected / real if real else 1:.4f}")


def on_one_device(tree: Any) -> int:
    return sum(x.addressable_shards[-1].data.nbytes for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
