"""The search of the mesh with the shortest step."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from slam_jax.errors import ConfigError
from slam_jax.planning.machine import Exchange, Machine
from slam_jax.planning.plans import Plan, StateBytes, plan_step, state_bytes
from slam_jax.planning.subjects import Subject
from slam_jax.training.mesh import MeshConfig, make_mesh

_AXES: tuple[str, ...] = ("data", "fsdp", "process", "tensor")


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

    Meshes that cannot hold the state are left out, by exact bytes. The others are ordered by the
    estimate of `estimated_sent`, and the step is compiled for the first `compile_at_most`.

    Raises:
      ConfigError: no mesh holds the state.
    """
    num_devices = len(jax.devices())
    _, state = subject.state()
    meshes = list(_even_meshes(subject, num_devices))
    candidates = []
    for mesh in meshes:
        held = state_bytes(state, mesh, subject.mesh.zero)
        if sum(held) <= machine.device_memory_gib * 2**30:
            candidates.append((_estimated_seconds(subject, mesh, held, machine), mesh))
    if not candidates:
        raise ConfigError(
            f"no mesh of {num_devices} devices holds the state in "
            f"{machine.device_memory_gib:g} GiB each; give more --devices or --device_memory_gib, "
            "or mesh.zero=True"
        )
    candidates.sort(key=lambda candidate: candidate[0])
    chosen = [mesh for _, mesh in candidates[:compile_at_most]]
    plans = [plan_step(subject, mesh, machine, state) for mesh in chosen]
    plans.sort(key=lambda plan: (plan.exceeding, plan.step_seconds))
    return Found(plans, len(meshes), len(candidates))


def _even_meshes(subject: Subject, num_devices: int) -> Iterator[Mesh | None]:
    for product in factors(num_devices, len(_AXES)):
        sizes: Any = dict(zip(_AXES, product, strict=True))
        if subject.num_heads % sizes["tensor"] or subject.num_processes % sizes["process"]:
            continue
        mesh = make_mesh(MeshConfig(**sizes))
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


def estimated_sent(
    subject: Subject, sizes: Mapping[str, int], held: StateBytes
) -> dict[Exchange, int]:
    """A rough estimate of what a step sends, from shapes alone.

    `data`: gradients once. `fsdp`: weights twice, gradients once. `tensor`: activations between
    layers four times. `process`: encoder tokens five times.
    """
    rows = sizes["data"] * sizes["fsdp"]
    encoded, streams = (num_bytes // rows for num_bytes in subject.stream_bytes)
    whole = held.params * sizes["fsdp"]
    return {
        (("data",), "all-reduce"): held.params,
        (("fsdp",), "all-gather"): 2 * whole,
        (("fsdp",), "reduce-scatter"): whole,
        (("tensor",), "all-reduce"): 4 * streams,
        (("process",), "all-reduce"): 5 * encoded,
    }


def _estimated_seconds(
    subject: Subject, mesh: Mesh | None, held: StateBytes, machine: Machine
) -> float:
    sizes = dict.fromkeys(_AXES, 1) if mesh is None else dict(mesh.shape)
    sent = machine.seconds(estimated_sent(subject, sizes, held), sizes)
    flops = subject.flops.of_device(sizes, subject.num_heads)
    return flops / (machine.device_tflops * 1e12) + sum(sent.values())
