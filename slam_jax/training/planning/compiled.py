"""What a step sends and keeps, from its program as XLA compiles it for as many CPU devices.

A program for 1,024 devices is one program, as fast to compile as for two; one of a hundred layers
is not. So models of one and of two layers of a kind are compiled, and what the second one adds is
added for every layer more. Of bytes sent that is exact where all layers of a kind are alike, and a
test compares it; of what a step keeps it is an estimate.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from slam_jax.layers.backend import for_accelerators
from slam_jax.layers.constrain import AXES, fit
from slam_jax.training.collectives import collectives
from slam_jax.training.planning.machine import Sent
from slam_jax.training.planning.subjects import Subject
from slam_jax.training.sharding import in_force, laid_out

# Nothing of it is run: the text is the same without these.
_QUICK: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Step(NamedTuple):
    """Of one device. kept: bytes beside the state. sent: (axes, operation) -> bytes."""

    kept: int
    sent: Sent


def compiled_step(subject: Subject, mesh: Mesh | None) -> Step:
    """Of the step as it stands, all of its layers compiled."""
    sizes = {"data": 1} if mesh is None else dict(mesh.shape)

    def like(x: Any) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        sharding = NamedSharding(mesh, fit(x.shape, [AXES["batch"]], sizes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    graphdef, shapes = subject.state()
    state = laid_out(shapes, mesh, zero=subject.mesh.zero)
    with in_force(mesh), for_accelerators():
        lowered = subject.step(graphdef, state).lower(state, jax.tree.map(like, subject.batch))
        compiled = lowered.compile(compiler_options=_QUICK)
    sent: Counter = Counter()
    for each in collectives(compiled.as_text(), sizes):
        sent[each.axes, each.op] += each.count * each.num_bytes
    return Step(compiled.memory_analysis().temp_size_in_bytes, dict(sent))


def extrapolated(
    subject: Subject, measure: Callable[[Subject], Step]
) -> tuple[Step, Sequence[Mapping[str, int]]]:
    """The step of the whole subject, and the numbers of layers for which `measure` was asked."""
    deep = {name: depth for name, depth in subject.depths.items() if depth.repeats > 2}
    base = {name: depth.layers(1) for name, depth in deep.items()}
    first, asked = measure(subject.with_layers(base)), [base]
    kept, sent = first.kept, Counter(first.sent)
    for name, depth in deep.items():
        asked.append({**base, name: depth.layers(2)})
        second, times = measure(subject.with_layers(asked[-1])), depth.repeats - 1
        kept += times * (second.kept - first.kept)
        for key in {*first.sent, *second.sent}:
            sent[key] += times * (second.sent.get(key, 0) - first.sent.get(key, 0))
    return Step(kept, dict(sent)), asked
