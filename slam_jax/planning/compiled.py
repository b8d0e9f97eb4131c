"""What a step sends and takes, from its program as XLA compiles it for as many CPU devices.

A program for 1,024 devices is one program, as fast to compile as for two; one of a hundred layers
is not. So models of one and of two layers of a kind are compiled, and what the second one adds is
added for every layer more. Of bytes sent, and of activations, that is exact where all layers of a
kind are alike, and a test compares it; of what the program takes it is an estimate.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Var
from jax.sharding import Mesh, NamedSharding

from slam_jax.layers.backend import for_accelerators
from slam_jax.layers.constrain import AXES, fit
from slam_jax.planning.collectives import collectives
from slam_jax.planning.machine import Sent
from slam_jax.planning.subjects import Subject
from slam_jax.training.sharding import bytes_per_device, in_force, laid_out
from slam_jax.training.state import merge_model

# Nothing of it is run: the text is the same without these.
_QUICK: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Step(NamedTuple):
    """Of one device, in bytes.

    taken: beside the state, by the program at its fullest. activations: kept from the forward pass
    for the backward one. sent: by axes and operation.
    """

    taken: int
    activations: int
    sent: Sent


def compiled_step(subject: Subject, mesh: Mesh | None) -> Step:
    """Of the step as it stands, all of its layers compiled."""
    sizes = {"data": 1} if mesh is None else dict(mesh.shape)

    def like(x: Any) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        sharding = NamedSharding(mesh, fit(x.shape, [AXES["batch"]], sizes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def loss(params: Any, given: Any) -> Any:
        part, key = given
        return subject.loss(merge_model(graphdef, params), part, key=key).total

    graphdef, shapes = subject.state()
    state = laid_out(shapes, mesh, zero=subject.mesh.zero)
    with in_force(mesh), for_accelerators():
        lowered = subject.step(graphdef, state).lower(state, jax.tree.map(like, subject.batch))
        compiled = lowered.compile(compiler_options=_QUICK)
        given = (jax.tree.map(like, subject.part), state.key)
        activations = kept_for_gradients(loss, state.params, given)
    sent: Counter = Counter()
    for each in collectives(compiled.as_text(), sizes):
        sent[each.axes, each.op] += each.count * each.num_bytes
    taken = compiled.memory_analysis().temp_size_in_bytes
    return Step(taken, bytes_per_device(activations), dict(sent))


def kept_for_gradients(
    loss: Callable[[Any, Any], Any], params: Any, given: Any
) -> list[jax.ShapeDtypeStruct]:
    """What differentiation keeps of the loss of what is given, such as examples and a key: each
    array once and where XLA has it stand.

    Left out is what is made of parameters alone, as by a cast, or of nothing, as a causal mask.
    """

    def forward(params: Any, given: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, given), params)[1])

    traced = jax.jit(forward).trace(params, given)
    shardings = traced.lower().compile(compiler_options=_QUICK).output_shardings
    jaxpr = traced.jaxpr.jaxpr
    first = len(jax.tree.leaves(params))
    made = _made_of(jaxpr.invars[first:], jaxpr)
    kept = {
        var: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for var, x, sharding in zip(made, traced.out_info, shardings, strict=True)
        if var is not None
    }
    return list(kept.values())


def _made_of(given: Sequence[Var], jaxpr: Jaxpr) -> list[Var | None]:
    """The results of a program; None for those that none of the given arrays goes into."""
    made = set(given)

    def into(vars: Sequence[Any]) -> list[Var | None]:
        return [var if isinstance(var, Var) and var in made else None for var in vars]

    for eqn in jaxpr.eqns:
        used, results = into(eqn.invars), eqn.outvars
        if eqn.primitive.name == "jit":  # its results need not all be made of all that it takes
            inner = eqn.params["jaxpr"].jaxpr
            taken = [own for own, var in zip(inner.invars, used, strict=True) if var is not None]
            those = _made_of(taken, inner)
            results = [var for var, own in zip(results, those, strict=True) if own is not None]
        made.update(results if any(var is not None for var in used) else ())
    return into(jaxpr.outvars)


def extrapolated(
    subject: Subject, measure: Callable[[Subject], Step]
) -> tuple[Step, Sequence[Mapping[str, int]]]:
    """The step of the whole subject, and the numbers of layers for which `measure` was asked."""
    deep = {name: depth for name, depth in subject.depths.items() if depth.repeats > 2}
    base = {name: depth.layers(1) for name, depth in deep.items()}
    first, asked = measure(subject.with_layers(base)), [base]
    taken, activations, sent = first.taken, first.activations, Counter(first.sent)
    for name, depth in deep.items():
        asked.append({**base, name: depth.layers(2)})
        second, times = measure(subject.with_layers(asked[-1])), depth.repeats - 1
        taken += times * (second.taken - first.taken)
        activations += times * (second.activations - first.activations)
        for key in {*first.sent, *second.sent}:
            sent[key] += times * (second.sent.get(key, 0) - first.sent.get(key, 0))
    return Step(taken, activations, dict(sent)), asked
