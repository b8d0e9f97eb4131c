"""The state of a run, and the pure training step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from slam_jax.layers.constrain import constrain
from slam_jax.layers.precision import upcast, widen
from slam_jax.training.optimizer import global_norm, updates_made
from slam_jax.training.trainable import merge


@struct.dataclass
class TrainState:
    """The whole state of a run: saved, restored and donated as one.

    step: number of steps taken, skipped ones included. skipped: number of skipped steps.
    bad_steps: number of steps skipped in a row up to now. params: those that train, as nested dicts
    of arrays. ema: their moving average in float32 or wider, or None. key: the key of a step is
    folded from it and the step. frozen: the other parameters, which no step changes; None = all
    train.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    bad_steps: Int[Array, ""]
    params: Any
    opt_state: optax.OptState
    ema: Any
    key: PRNGKeyArray
    frozen: Any = None

    @property
    def best_params(self) -> Any:
        """The parameters to evaluate, frozen ones included; of the others their moving average
        where there is one. They have the dtypes of the model."""
        if self.ema is None:
            return merge(self.params, self.frozen)
        average = jax.tree.map(lambda x, like: x.astype(like.dtype), self.ema, self.params)
        return merge(average, self.frozen)


class StepMetrics(NamedTuple):
    """loss: the result of the loss function. bad_steps: number of steps skipped in a row, this one
    included; 0 where it was not skipped. updates: number of optimizer updates before this step,
    None where the optimizer does not count them."""

    loss: Any
    grad_norm: Float[Array, ""]
    bad_steps: Int[Array, ""]
    updates: Int[Array, ""] | None


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    """The structure of a model and its parameters in nested dicts; `merge_model` is the inverse."""
    graphdef, params = nnx.split(model)
    return graphdef, nnx.to_pure_dict(params)


def merge_model(graphdef: nnx.GraphDef, params: Any) -> Any:
    return nnx.merge(graphdef, nnx.State(params))


def first_average(params: Any) -> Any:
    """The moving average of the parameters before the first step. In bfloat16, what one step adds
    to an average would be lost by rounding."""
    return widen(jax.tree.map(jnp.copy, params))


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    *,
    ema: bool,
    frozen: Any = None,
) -> TrainState:
    step, skipped, bad_steps = (jnp.zeros((), jnp.int32) for _ in range(3))
    average = first_average(params) if ema else None
    opt_state = optimizer.init(widen(params))
    return TrainState(step, skipped, bad_steps, params, opt_state, average, key, frozen)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A pure training step (state, batch) -> (state, metrics), and its two halves.

    Batches of another shape need a program of their own for the gradients, but not for the update.
    So a run jits the halves one by one (`jit_train_step`) and compiles the update once.

    gradients: (state, batch) -> (gradients of the parameters that train, result of the loss
    function).
    update: (state, gradients, result of the loss function) -> (state, metrics).
    """

    gradients: Callable[[TrainState, Any], tuple[Any, Any]]
    update: Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        return self.update(state, *self.gradients(state, batch))


def make_train_step(
    graphdef: nnx.GraphDef,
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    accumulate_steps: int = 1,
    weight_of: Callable[[Any], Any] = lambda part: 1.0,
) -> TrainStep:
    """A pure training step, to be jitted with the state donated.

    loss_fn: (model, batch, key=) -> a NamedTuple of scalars such as `LossParts`, whose `total` is
    minimised; it becomes `StepMetrics.loss`.
    accumulate_steps: the batch is split into this many parts along its leading axis, and their
    gradients and metrics are averaged. weight_of: part -> its weight in that average, such as
    `num_answer_tokens`; by default all parts weigh the same.

    A step whose loss or gradient is not finite is skipped: `state.step` increases, but parameters,
    optimizer state (with the step count of its schedule) and average stay as they were.
    """

    def gradients(state: TrainState, batch: Any) -> tuple[Any, Any]:
        def of_part(params, batch, key):
            def loss(params):
                model = merge_model(graphdef, merge(params, state.frozen))
                parts = loss_fn(model, batch, key=key)
                return parts.total, parts

            return jax.grad(loss, has_aux=True)(params)

        key = jax.random.fold_in(state.key, state.step)
        return _accumulate(of_part, state.params, batch, key, accumulate_steps, weight_of)

    def update(state: TrainState, grads: Any, loss: Any) -> tuple[TrainState, StepMetrics]:
        grad_norm = global_norm(grads)
        bad = ~(jnp.isfinite(loss.total) & jnp.isfinite(grad_norm))
        updates, opt_state = optimizer.update(widen(grads), state.opt_state, widen(state.params))
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if ema_decay is not None:
            # The average forgets the random initial values first, then settles.
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, 1.0 - decay)
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)
        bad_steps = jnp.where(bad, state.bad_steps + 1, 0)
        metrics = StepMetrics(loss, grad_norm, bad_steps, updates_made(state.opt_state))
        counts = state.step + 1, state.skipped + bad, bad_steps
        return TrainState(*counts, params, opt_state, ema, state.key, state.frozen), metrics

    return TrainStep(gradients, update)


def _accumulate(
    gradients: Callable[..., Any],
    params: Any,
    batch: Any,
    key: PRNGKeyArray,
    num_parts: int,
    weight_of: Callable[[Any], Any],
) -> Any:
    """The weighted mean of `gradients(params, part, key)` over the parts of a batch."""
    if num_parts == 1:
        return gradients(params, batch, key)
    # Each device takes a share of every part; neighbouring examples may be on one device.
    parts = jax.tree.map(
        lambda x: constrain(x.reshape(num_parts, -1, *x.shape[1:]), (None, "batch")), batch
    )
    keys = jax.random.split(key, num_parts)
    weights = jax.vmap(weight_of)(parts)
    shares = weights / jnp.maximum(weights.sum(), 1)

    def add(total, inputs):
        share, part, key = inputs
        new = gradients(params, part, key)
        return jax.tree.map(lambda x, y: x + (share * y).astype(x.dtype), total, new), None

    shapes = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, upcast(s.dtype)), shapes)
    return jax.lax.scan(add, zeros, (shares, parts, keys))[0]
