"""The search of the mesh with the shortest step."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from slam_jax.errors import ConfigError
from slam_jax.planning.compiled import Step
from slam_jax.planning.machine import Machine
from slam_jax.planning.plans import Plan, plan_step, state_bytes
from slam_jax.planning.subjects import Subject
from slam_jax.training.mesh import MeshConfig, make_mesh


class Found(NamedTuple):
    """Result of a search.

    plans: of the compiled meshes; those that fit come first, then by time of a step. tried: number
    of meshes that divide batch, heads and processes. holding: those of them that hold the state.
    """

    plans: list[Plan]
    tried: int
    holding: int


def search(subject: Subject, machine: Machine, compile_at_most: int) -> Found:
    """Plans the most promising meshes of JAX's devices.

    Meshes that cannot hold the state are left out, by exact bytes. The others are ordered by a
    rough estimate, and the step is compiled for the first `compile_at_most`.

    Raises:
      ConfigError: no mesh holds the state.
    """
    num_devices = len(jax.devices())
    meshes = list(_even_meshes(subject, num_devices))
    rough = [(_estimated(subject, mesh, machine), mesh) for mesh in meshes]
    holding = [(plan, mesh) for plan, mesh in rough if plan.share(sum(plan.state)) <= 1]
    if not holding:
        raise ConfigError(
            f"no mesh of {num_devices} devices holds the state in "
            f"{machine.device_memory_gib:g} GiB each; give more --devices or --device_memory_gib, "
            "or mesh.zero=True"
        )
    holding.sort(key=lambda candidate: candidate[0].step_seconds)
    plans = [plan_step(subject, mesh, machine) for _, mesh in holding[:compile_at_most]]
    plans.sort(key=lambda plan: (plan.exceeding, plan.step_seconds))
    return Found(plans, len(meshes), len(holding))


def _even_meshes(subject: Subject, num_devices: int) -> Iterator[Mesh | None]:
    for data, fsdp, process, tensor in factors(num_devices, 4):
        if subject.config.num_heads % tensor or subject.num_processes % process:
            continue
        mesh = make_mesh(MeshConfig(data, fsdp, process, tensor))
        with contextlib.suppress(ConfigError):
            subject.require_even(mesh)
            yield mesh


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product of `count` factors."""
    if count == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in factors(number // first, count - 1))


def _estimated(subject: Subject, mesh: Mesh | None, machine: Machine) -> Plan:
    """A plan whose step sends a rough estimate, from shapes alone.

    `data`: gradients once. `fsdp`: weights twice, gradients once. `tensor`: activations between
    layers four times. `process`: encoder tokens ten times, five of them gathered.
    """
    sizes = {**MeshConfig(1, process=1).sizes, **({} if mesh is None else mesh.shape)}
    held = state_bytes(subject, mesh)
    encoded, streams = (n // (sizes["data"] * sizes["fsdp"]) for n in subject.stream_bytes)
    sent = {
        (("data",), "all-reduce"): held.params,
        (("fsdp",), "all-gather"): 2 * (held.params + held.frozen) * sizes["fsdp"],
        (("fsdp",), "reduce-scatter"): held.params * sizes["fsdp"],
        (("tensor",), "all-reduce"): 4 * streams,
        (("process",), "all-gather"): 5 * encoded,
        (("process",), "reduce-scatter"): 5 * encoded,
    }
    flops = subject.flops_of_device(sizes)
    return Plan(sizes, held, Step(0, 0, sent), flops, machine)
