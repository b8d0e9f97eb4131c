"""Equal layers: one module each, or one module with stacked parameters and a scan over them.

A scan is compiled once for all of its layers. On CPUs it is slower than separate layers, so there
they are separate by default.

Stacked layers have a slice for a name: `layers/2:8` holds the layers 2 to 7 along its leading axis,
and `layers/3:11:2` every second one. Everything that users see names single layers; `names_of`
gives them.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.kernels.backend import on_cpu
from slam_jax.layers.remat import remat

# With fewer layers, a scan saves too little time of compilation to be the default.
_LEAST = 5

Make = Callable[..., nnx.Module]


class Repeated(NamedTuple):
    """The layers of one period, each with the parameters of all `count` periods stacked."""

    period: tuple[Any, ...]
    count: int


def repeat(scan: bool | None, count: int, *makes: Make, rngs: nnx.Rngs) -> list[Any]:
    """`count` times the layers that `makes` make, each of them `make(rngs=)`, for `collect`.

    They start with the same values whether they are stacked or not.
    scan: whether to stack them; None = on GPUs and TPUs, from five layers on.
    """
    default = not on_cpu() and count * len(makes) >= _LEAST
    if count < 2 or not (default if scan is None else scan):
        return [make(rngs=rngs) for _ in range(count) for make in makes]
    graphdef, state = nnx.split(rngs)

    def period(state: Any, _: None) -> tuple[Any, tuple[Any, ...]]:
        rngs = nnx.merge(graphdef, state)
        layers = tuple(make(rngs=rngs) for make in makes)
        return nnx.state(rngs), layers

    state, layers = jax.lax.scan(period, state, length=count)
    nnx.update(rngs, state)
    return [Repeated(layers, count)]


class _Run(NamedTuple):
    """`count` periods of layers, from the layer `first` on; names: those of their attributes."""

    first: int
    count: int
    names: tuple[str, ...]

    @property
    def stop(self) -> int:
        return self.first + self.count * len(self.names)


class StackedLayers(nnx.Module):
    """A sequence of layers, some of them stacked. An index gives a single layer.

    In a stack of such sequences, as in the encoder processes, take one member of it first.
    """

    def __init__(self, layers: Sequence[Any]):
        runs, first = [], 0
        for layer in layers:
            period, count = layer if isinstance(layer, Repeated) else ((layer,), 1)
            stop, step = first + count * len(period), len(period)
            every = f":{step}" if step > 1 else ""
            names = [f"{first + i}:{stop}{every}" for i in range(step)]
            names = names if count > 1 else [str(first)]
            for name, module in zip(names, period, strict=True):
                setattr(self, name, module)
            runs.append(_Run(first, count, tuple(names)))
            first = stop
        self.runs = tuple(runs)

    def __len__(self) -> int:
        return self.runs[-1].stop

    def __getitem__(self, index: int) -> Any:
        run = next(run for run in self.runs if index < run.stop)
        period, place = divmod(index - run.first, len(run.names))
        layer = getattr(self, run.names[place])
        return layer if run.count == 1 else jax.tree.map(lambda x: x[period], layer)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def collect(layers: Sequence[Any]) -> Any:
    """The sequence of modules, and of what `repeat` gives, as one module."""
    if any(isinstance(layer, Repeated) for layer in layers):
        return StackedLayers(layers)
    return nnx.List(layers)


def equal_layers(scan: bool | None, count: int, make: Make, *, rngs: nnx.Rngs) -> Any:
    """`count` layers that `make` makes, as one module; see `repeat`."""
    return collect(repeat(scan, count, make, rngs=rngs))


def kinds(layers: Any) -> list[Any]:
    """For each layer a module with its sizes. Its parameters may be those of several layers."""
    if not isinstance(layers, StackedLayers):
        return list(layers)
    return [
        getattr(layers, name) for run in layers.runs for _ in range(run.count) for name in run.names
    ]


def run_layers(
    call: Callable[[Any, Any, Any], tuple[Any, Any]],
    layers: Any,
    carry: Any,
    inputs: Sequence[Any],
    *,
    policy: str | None = None,
    unroll: bool = False,
) -> tuple[Any, list[Any]]:
    """`carry, output = call(layer, carry, input)` of all layers, and their outputs.

    Stacked layers are scanned.

    inputs: one pytree a layer. policy: of `slam_jax.layers.remat`, for each call. unroll: calls one
    layer after the other, also where they are stacked, which is faster for a single token.
    """

    def step(layer: Any, carry: Any, x: Any, **options: Any) -> tuple[Any, Any]:
        return remat(functools.partial(call, layer), policy, **options)(carry, x)

    outputs: list[Any] = []
    if unroll or not isinstance(layers, StackedLayers):
        for layer, x in zip(layers, inputs, strict=True):
            carry, output = step(layer, carry, x)
            outputs.append(output)
        return carry, outputs

    def period(carry: Any, given: Any) -> tuple[Any, list[Any]]:
        found = []
        for layer, x in zip(*given, strict=True):
            # A scan's body is apart from its backward pass, so nothing can be merged.
            carry, output = step(layer, carry, x, prevent_cse=False)
            found.append(output)
        return carry, found

    for run in layers.runs:
        modules, own = [getattr(layers, name) for name in run.names], inputs[run.first : run.stop]
        if run.count == 1:
            carry, output = step(modules[0], carry, own[0])
            outputs.append(output)
            continue
        each = [own[i :: len(modules)] for i in range(len(modules))]
        stacked = [jax.tree.map(lambda *x: jnp.stack(x), *part) for part in each]
        carry, found = jax.lax.scan(period, carry, (modules, stacked))
        for i, output in itertools.product(range(run.count), found):
            outputs.append(jax.tree.map(lambda x, i=i: x[i], output))
    return carry, outputs


def names_of(name: str) -> tuple[list[str], int | None]:
    """The names of the layers that share an array, and the axis along which it has them.

    An array of one layer has its own name and no such axis. The members of a "stack" come before
    its layers.
    """
    parts = name.split("/")
    for i, part in enumerate(parts):
        if ":" in part:
            layers = range(*map(int, part.split(":")))
            names = ["/".join([*parts[:i], str(layer), *parts[i + 1 :]]) for layer in layers]
            return names, parts[:i].count("stack")
    return [name], None
