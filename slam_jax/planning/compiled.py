"""What a training step sends and how much memory it takes, from its compiled executable.

Compile time grows with the number of layers. So models with one and with two layers of a kind are
compiled, and the difference is added for every further layer. For bytes sent and activations this
is exact if all layers of a kind are alike; for temporary memory it is an estimate.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Var
from jax.sharding import Mesh, NamedSharding

from slam_jax.kernels.backend import for_accelerators
from slam_jax.layers.constrain import AXES, fit
from slam_jax.planning.collectives import collectives
from slam_jax.planning.machine import Sent
from slam_jax.planning.subjects import Subject
from slam_jax.training.sharding import bytes_per_device, use_mesh, with_shardings
from slam_jax.training.start import compile_step, temporary_bytes
from slam_jax.training.state import merge_model
from slam_jax.training.trainable import merge, names_layers

# The executable is not run, and these passes do not change what is read from it.
_FAST: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Step(NamedTuple):
    """Bytes of one device.

    taken: the peak of temporary memory with the gradients, the state not included. activations:
    kept from the forward pass for the backward pass. sent: by mesh axes and operation.
    """

    taken: int
    activations: int
    sent: Sent


def compiled_step(subject: Subject, mesh: Mesh | None) -> Step:
    """The figures of a subject's step with all of its layers compiled."""
    sizes = {"data": 1} if mesh is None else dict(mesh.shape)

    def part(parts: int, x: Any) -> jax.ShapeDtypeStruct:
        shape = (x.shape[0] // parts, *x.shape[1:])
        batch = fit(shape, [AXES["batch"]], sizes)
        sharding = None if mesh is None else NamedSharding(mesh, batch)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    def loss(params: Any, batch_and_key: Any) -> Any:
        batch, key = batch_and_key
        return subject.loss(merge_model(graphdef, params), batch, key=key).total

    graphdef, state = subject.state
    state = with_shardings(state, mesh, zero=subject.mesh.zero)
    with use_mesh(mesh), for_accelerators():
        whole = jax.tree.map(functools.partial(part, 1), subject.batch)
        halves = compile_step(subject.step(graphdef, state), state, whole, _FAST)
        split = functools.partial(part, subject.optimizer.accumulate_steps)
        batch_and_key = jax.tree.map(split, subject.batch), state.key
        activations = residuals(loss, state.params, batch_and_key, state.frozen)
    sent: Counter = Counter()
    for each in itertools.chain(*(collectives(str(half.as_text()), sizes) for half in halves)):
        sent[each.axes, each.op] += each.count * each.num_bytes
    return Step(temporary_bytes(*halves), bytes_per_device(activations), dict(sent))


def program_lines(subject: Subject, mesh: Mesh | None) -> int:
    """Lines of StableHLO of both halves of a subject's training step for GPUs and TPUs, which
    compile time grows with. Nothing is compiled."""
    with use_mesh(mesh), for_accelerators():
        # The subject may have a state already, which was made for a CPU, without stacked layers.
        graphdef, state = dataclasses.replace(subject).state
        state = with_shardings(state, mesh, zero=subject.mesh.zero)
        step: Any = subject.step(graphdef, state)
        gradients = step.gradients.lower(state, subject.batch)
        halves = gradients, step.update.lower(state, *gradients.out_info)
        return sum(half.as_text().count("\n") for half in halves)


def residuals(
    loss: Callable[[Any, Any], Any], params: Any, inputs: Any, frozen: Any = None
) -> list[jax.ShapeDtypeStruct]:
    """Arrays that `jax.vjp` keeps of `loss(params, inputs)`, each once, with XLA's shardings.

    frozen: further parameters of the loss, by which nothing is differentiated.

    Only those that depend on `inputs` count: not casts of parameters, nor causal masks.
    """

    def forward(params: Any, frozen: Any, inputs: Any) -> list[Any]:
        whole = lambda params: loss(merge(params, frozen), inputs)  # noqa: E731
        return jax.tree.leaves(jax.vjp(whole, params)[1])

    traced = jax.jit(forward).trace(params, frozen, inputs)
    shardings = traced.lower().compile(compiler_options=_FAST).output_shardings
    jaxpr = traced.jaxpr.jaxpr
    kept = dependent(jaxpr.invars[len(jax.tree.leaves((params, frozen))) :], jaxpr)
    found = {
        var: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for var, x, sharding in zip(kept, traced.out_info, shardings, strict=True)
        if var is not None
    }
    return list(found.values())


def dependent(inputs: Sequence[Var], jaxpr: Jaxpr) -> list[Var | None]:
    """The results of a jaxpr, None in place of those that do not depend on `inputs`."""
    reached = set(inputs)

    def select(vars: Sequence[Any]) -> list[Var | None]:
        return [var if isinstance(var, Var) and var in reached else None for var in vars]

    for eqn in jaxpr.eqns:
        used, results = select(eqn.invars), eqn.outvars
        if eqn.primitive.name == "jit":  # not every result depends on every argument
            inner = eqn.params["jaxpr"].jaxpr
            taken = [own for own, var in zip(inner.invars, used, strict=True) if var is not None]
            own = dependent(taken, inner)
            results = [var for var, own in zip(results, own, strict=True) if own is not None]
        reached.update(results if any(var is not None for var in used) else ())
    return select(jaxpr.outvars)


def extrapolated(
    subject: Subject, measure: Callable[[Subject], Step]
) -> tuple[Step, Sequence[Mapping[str, int]]]:
    """The step of the whole subject, and the numbers of layers that `measure` was called with."""
    deep = {name: depth for name, depth in subject.depths.items() if depth.repeats > 2}
    if names_layers(subject.patterns):  # then a further layer need not add as much as the last
        deep = {}
    base = {name: depth.layers(1) for name, depth in deep.items()}
    first, measured = measure(subject.with_layers(base)), [base]
    taken, activations, sent = first.taken, first.activations, Counter(first.sent)
    for name, depth in deep.items():
        measured.append({**base, name: depth.layers(2)})
        second, more = measure(subject.with_layers(measured[-1])), depth.repeats - 1
        taken += more * (second.taken - first.taken)
        activations += more * (second.activations - first.activations)
        for key in {*first.sent, *second.sent}:
            sent[key] += more * (second.sent.get(key, 0) - first.sent.get(key, 0))
    return Step(taken, activations, dict(sent)), measured
