"""The initial state of a run, or its shapes, and the jitted training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from slam_jax.runtime.memory import require_memory
from slam_jax.slam_v3 import SlamV3
from slam_jax.training.experiment import Experiment
from slam_jax.training.losses import num_answer_tokens, slam_v3_loss
from slam_jax.training.optimizer import make_optimizer
from slam_jax.training.sharding import bytes_per_device, with_shardings
from slam_jax.training.state import (
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    split_model,
)


def initial_state(
    experiment: Experiment, vocab_size: int, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of the model and the state before the first step, sharded over the mesh.

    Raises ConfigError, before anything is allocated, where it does not fit into memory.
    """
    graphdef, like = state_shapes(experiment, vocab_size, mesh)
    require_room_for(like, mesh)
    # One jitted function: a hundred single initialisers would take longer, and so no device ever
    # holds more than its shard. A restored state has the same shardings.
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return graphdef, jax.jit(_state_maker(experiment, vocab_size), out_shardings=shardings)()


def require_room_for(like: TrainState, mesh: Mesh | None) -> None:
    """Raises ConfigError where a state of these shapes and shardings does not fit into memory."""
    num_devices = 1 if mesh is None else mesh.size
    require_memory(num_devices * bytes_per_device(like), "the training state")


def state_shapes(
    experiment: Experiment, vocab_size: int, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """`initial_state` with shapes, dtypes and shardings instead of arrays; allocates nothing."""
    config = experiment.with_vocabulary(vocab_size)
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    shapes = jax.eval_shape(_state_maker(experiment, vocab_size))
    return split_model(model)[0], with_shardings(shapes, mesh, zero=experiment.mesh.zero)


def jit_step(experiment: Experiment, graphdef: nnx.GraphDef, state: TrainState) -> TrainStep:
    """The jitted training step of a run. It donates its state and returns it sharded as `state`."""
    options = experiment.optimizer
    step = make_train_step(
        graphdef,
        loss_of(experiment),
        make_optimizer(options, experiment.run.num_steps),
        ema_decay=options.ema_decay,
        accumulate_steps=options.accumulate_steps,
        weight_of=num_answer_tokens,
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def loss_of(experiment: Experiment) -> Callable[..., Any]:
    """The loss function of a run: (model, batch, key=) -> LossParts."""
    return functools.partial(slam_v3_loss, config=experiment.loss)


def _state_maker(experiment: Experiment, vocab_size: int) -> Callable[[], TrainState]:
    """A function that makes the first state, keys included, alike in every process of a run."""
    config = experiment.with_vocabulary(vocab_size)
    optimizer = make_optimizer(experiment.optimizer, experiment.run.num_steps)
    ema = experiment.optimizer.ema_decay is not None

    def make() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(experiment.seed))
        params = split_model(SlamV3(config, rngs=nnx.Rngs(init_key)))[1]
        return init_state(params, optimizer, run_key, ema=ema)

    return make
