"""The mesh of the shortest step, among those of so many devices on which a run fits."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from slam_jax.errors import ConfigError
from slam_jax.planning.machine import Exchange, Machine
from slam_jax.planning.plans import Plan, StateBytes, plan_step, state_bytes
from slam_jax.planning.subjects import Subject
from slam_jax.training.mesh import MeshConfig, make_mesh


class Found(NamedTuple):
    """plans: of the meshes that were compiled, those that fit first and the fastest first among
    them. tried: meshes that divide the batch evenly; holding: those that hold the state."""

    plans: list[Plan]
    tried: int
    holding: int


def search(subject: Subject, machine: Machine, compile_at_most: int) -> Found:
    """Tries every mesh of the devices that JAX has, whose axes divide their number.

    Exact bytes of the state leave out those that cannot hold it. The others are put in the order of
    a rough formula (`guessed`), and the step is compiled for the first `compile_at_most` of them.

    Raises ConfigError where no mesh holds the state.
    """
    num_devices = len(jax.devices())
    _, state = subject.state()
    meshes = list(_even(subject, num_devices))
    room = machine.device_memory_gib * 2**30
    guesses = []
    for mesh in meshes:
        held = state_bytes(state, mesh, subject.mesh.zero)
        if sum(held) <= room:
            guesses.append((_guessed_seconds(subject, mesh, held, machine), mesh))
    if not guesses:
        raise ConfigError(
            f"no mesh of {num_devices} devices holds the state in "
            f"{machine.device_memory_gib:g} GiB each; give more --devices or --device_memory_gib, "
            "or mesh.zero=True"
        )
    guesses.sort(key=lambda guess: guess[0])
    plans = [plan_step(subject, mesh, machine, state) for _, mesh in guesses[:compile_at_most]]
    plans.sort(key=lambda plan: (plan.exceeding, plan.step_seconds))
    return Found(plans, len(meshes), len(guesses))


def _even(subject: Subject, num_devices: int) -> Iterator[Mesh | None]:
    """The meshes that share batch, processes and heads evenly."""
    for sizes in factors(num_devices, 4):
        named = dict(zip(("data", "fsdp", "process", "tensor"), sizes, strict=True))
        uneven = subject.num_heads % named["tensor"] or subject.num_processes % named["process"]
        if not uneven:
            mesh = make_mesh(MeshConfig(**named))
            with contextlib.suppress(ConfigError):
                subject.require_even(mesh)
                yield mesh


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in factors(number // first, count - 1))


def guessed(subject: Subject, sizes: Mapping[str, int], held: StateBytes) -> dict[Exchange, int]:
    """Roughly what a step sends, from shapes alone: gradients once over `data`; over `fsdp` weights
    twice and gradients once; over `tensor` four times, and over `process` five times, what stands
    between layers."""
    encoded, streams = (
        num_bytes // (sizes["data"] * sizes["fsdp"]) for num_bytes in subject.stream_bytes
    )
    whole = held.params * sizes["fsdp"]
    return {
        (("data",), "all-reduce"): held.params,
        (("fsdp",), "all-gather"): 2 * whole,
        (("fsdp",), "reduce-scatter"): whole,
        (("tensor",), "all-reduce"): 4 * streams,
        (("process",), "all-reduce"): 5 * encoded,
    }


def _guessed_seconds(subject: Subject, mesh: Mesh | None, held: StateBytes, machine: Machine):
    sizes = {"data": 1, "fsdp": 1, "process": 1, "tensor": 1} if mesh is None else dict(mesh.shape)
    sent = {key: num for key, num in guessed(subject, sizes, held).items() if sizes[key[0][0]] > 1}
    flops = subject.flops.of_device(sizes, subject.num_heads)
    return flops / (machine.device_tflops * 1e12) + sum(machine.seconds(sent, sizes).values())
