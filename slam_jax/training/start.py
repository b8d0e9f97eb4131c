"""The initial state of a run, or its shapes, and the jitted training step."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Compiled

from slam_jax.runtime.memory import require_memory
from slam_jax.training.base import Bases, load_bases, provided_by, without_bases
from slam_jax.training.mesh import more_fsdp
from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
from slam_jax.training.sharding import bytes_per_device, shardings_of, with_shardings
from slam_jax.training.state import (
    TrainState,
    TrainStep,
    first_average,
    init_state,
    make_train_step,
    split_model,
)
from slam_jax.training.task import Task
from slam_jax.training.trainable import merge, names_in, partition, split_of


def initial_state(
    task: Task, vocab_size: int, mesh: Mesh | None = None, bases: Bases = ()
) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of the model and the state before the first step, sharded over the mesh.

    Parameters of the bases have their values, also those that train.

    Raises ConfigError, before anything is allocated, where it does not fit into memory.
    """
    graphdef, like = state_shapes(task, vocab_size, mesh, bases)
    provided = provided_by(bases)
    # One jitted function: a hundred single initialisers would take longer, and so no device ever
    # holds more than its shard. A restored state has the same shardings.
    own = without_bases(like, bases)
    shardings = jax.tree.map(lambda x: x.sharding, own)
    seed, impl = task.experiment.seed, task.experiment.run.prng_impl
    names = names_in(like.params), names_in(own.frozen)
    make = functools.partial(_first_state, *_model_of(task, vocab_size), *names, seed, impl)
    state = jax.jit(make, out_shardings=shardings)()
    if not provided:
        return graphdef, state
    loaded = load_bases(bases, merge(like.params, like.frozen))
    trained, frozen = partition(loaded, names_in(like.frozen))
    params = merge(partition(state.params, names_in(trained))[0], trained)
    ema = state.ema and first_average(params)
    frozen = merge(state.frozen, frozen)
    return graphdef, dataclasses.replace(state, params=params, ema=ema, frozen=frozen)


def state_shapes(
    task: Task, vocab_size: int, mesh: Mesh | None = None, bases: Bases = ()
) -> tuple[nnx.GraphDef, TrainState]:
    """`initial_state` with shapes, dtypes and shardings instead of arrays; allocates nothing.

    Raises ConfigError where such a state does not fit into memory, and as `split_of` does.
    """
    parts, experiment = _model_of(task, vocab_size), task.experiment
    graphdef, shapes = abstract_state(*parts, experiment.run.prng_impl, provided_by(bases))
    like = with_shardings(shapes, mesh, zero=experiment.mesh.zero)
    num_devices = 1 if mesh is None else mesh.size
    advice = "" if mesh is None else more_fsdp(mesh.shape)
    require_memory(num_devices * bytes_per_device(like), "the training state", advice)
    return graphdef, like


def jit_step(task: Task, graphdef: nnx.GraphDef, state: TrainState) -> TrainStep:
    """The jitted training step of a run; see `jit_train_step`."""
    optimizer, num_steps = task.experiment.optimizer, task.experiment.run.num_steps
    arguments = graphdef, state, task.loss, optimizer, num_steps, task.weight_of
    return jit_train_step(*arguments, zero=task.experiment.mesh.zero)


def abstract_state(
    make_model: Callable[..., nnx.Module],
    optimizer: OptimizerConfig,
    num_steps: int,
    prng_impl: str = "threefry2x32",
    provided: Mapping[str, Any] = {},
) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of the model `make_model(rngs=)` and the shapes of its training state.

    provided: by bases; see `split_of`, which says what is raised.
    """
    graphdef, shapes = split_model(nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0))))
    split = split_of(shapes, optimizer, provided)
    params, frozen = split.of(split.shapes)
    names = names_in(params), set()
    make = functools.partial(_first_state, make_model, optimizer, num_steps, *names, 0, prng_impl)
    return graphdef, dataclasses.replace(jax.eval_shape(make), frozen=frozen)


def jit_train_step(
    graphdef: nnx.GraphDef,
    state: TrainState,
    loss: Callable[..., Any],
    optimizer: OptimizerConfig,
    num_steps: int,
    weight_of: Callable[[Any], Any],
    *,
    zero: bool = False,
) -> TrainStep:
    """A training step whose halves are jitted. It donates its state and returns it sharded as
    `state`; gradients are sharded as the moments of the optimizer. zero: see `MeshConfig`."""
    parts, decay = optimizer.accumulate_steps, optimizer.ema_decay
    arguments = graphdef, loss, make_optimizer(optimizer, num_steps)
    step = make_train_step(*arguments, ema_decay=decay, accumulate_steps=parts, weight_of=weight_of)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    mesh: Any = getattr(state.step.sharding, "mesh", None)
    moments = shardings_of({"gradients": state.params}, mesh, zero=zero)["gradients"]
    return TrainStep(
        jax.jit(step.gradients, out_shardings=(moments, None)),
        jax.jit(step.update, donate_argnums=0, out_shardings=(shardings, None)),
    )


def compile_step(
    step: TrainStep, state: TrainState, batch: Any, options: Any = None
) -> tuple[Compiled, Compiled]:
    """The executables of both halves of a jitted step, for these shapes and shardings."""
    gradients: Any = step.gradients
    update: Any = step.update
    first = gradients.lower(state, batch).compile(options)
    results = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        first.out_info,
        first.output_shardings,
    )
    return first, update.lower(state, *results).compile(options)


def temporary_bytes(gradients: Compiled, update: Compiled) -> int:
    """The peak of a compiled step's temporary memory on a device, with the gradients."""
    first: Any = gradients.memory_analysis()
    second: Any = update.memory_analysis()
    peak = max(first.temp_size_in_bytes, second.temp_size_in_bytes)
    return peak + first.output_size_in_bytes


def _model_of(task: Task, vocab_size: int) -> tuple[Any, OptimizerConfig, int]:
    return task.model(vocab_size), task.experiment.optimizer, task.experiment.run.num_steps


def _first_state(
    make_model: Callable[..., nnx.Module],
    optimizer: OptimizerConfig,
    num_steps: int,
    trained: Collection[str],
    frozen: Collection[str],
    seed: int,
    prng_impl: str,
) -> TrainState:
    """The first state, keys included, alike in every host process of a run.

    trained, frozen: the names of its parameters; others are left out.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    if prng_impl != "threefry2x32":
        run_key = jax.random.key(jax.random.bits(run_key), impl=prng_impl)
    others, params = partition(split_model(make_model(rngs=nnx.Rngs(init_key)))[1], trained)
    kept = partition(others, frozen)[1] or None
    ema = optimizer.ema_decay is not None
    make = make_optimizer(optimizer, num_steps)
    return init_state(params, make, run_key, ema=ema, frozen=kept)
