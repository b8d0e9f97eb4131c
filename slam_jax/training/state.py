"""The state of a run and the one pure step that takes it on."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.layers.backend import on_cpu
from slam_jax.layers.constrain import constrain
from slam_jax.training.optimizer import updates_made


@struct.dataclass
class TrainState:
    """All that a run is: saved, restored and donated as one.

    step: steps taken, those that were skipped among them. skipped: how many of them were, in all.
    bad_steps: how many the last ones were, in a row.
    params: nested dicts of arrays. ema: their running average, or None.
    key: the root of all randomness; that of a step is folded from it and the step.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    bad_steps: Int[Array, ""]
    params: Any
    opt_state: optax.OptState
    ema: Any
    key: PRNGKeyArray

    @property
    def best_params(self) -> Any:
        """The parameters to evaluate: the average where there is one."""
        return self.params if self.ema is None else self.ema


class StepMetrics(NamedTuple):
    """loss: what the loss function returned. bad_steps: 0, or how many steps in a row were skipped,
    this one among them. updates: how many the optimizer had made before, None where it does not
    count."""

    loss: Any
    grad_norm: Float[Array, ""]
    bad_steps: Int[Array, ""]
    updates: Int[Array, ""] | None


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    """A model as its structure and its parameters in nested dicts; `merge_model` is the inverse."""
    graphdef, params = nnx.split(model)
    return graphdef, nnx.to_pure_dict(params)


def merge_model(graphdef: nnx.GraphDef, params: Any) -> Any:
    return nnx.merge(graphdef, nnx.State(params))


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: PRNGKeyArray, *, ema: bool
) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        bad_steps=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        key=key,
    )


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """(state, batch) -> (state, metrics), in two halves.

    gradients: (state, batch) -> what the update needs of a batch. update: (state, that) -> (state,
    metrics), which is the same for batches of all kinds.
    """

    gradients: Callable[[TrainState, Any], Any]
    update: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    __name__ = "step"  # of its compiled program

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        return self.update(state, self.gradients(state, batch))


def make_train_step(
    graphdef: nnx.GraphDef,
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    accumulate_steps: int = 1,
    weight_of: Callable[[Any], Any] = lambda part: 1.0,
) -> TrainStep:
    """A step, to be jitted with the state donated.

    loss_fn: (model, batch, key=) -> a NamedTuple of scalars, of which `total` is minimised, such as
    `LossParts`; metrics have it as `loss`. With `accumulate_steps` the leading axis of the
    batch is taken in that many parts, whose gradients and metrics are averaged by weight.
    weight_of: (part) -> what its mean is of, such as `num_answer_tokens`; by default one is worth
    as much as any other.

    A step whose loss or gradient is not finite is skipped: it counts as taken, and parameters,
    optimizer and average stay as they were, the count that its schedule goes by among them.
    """

    def at_once(params, batch, key):
        def loss(params):
            parts = loss_fn(merge_model(graphdef, params), batch, key=key)
            return parts.total, parts

        return jax.grad(loss, has_aux=True)(params)

    def accumulated(params, batch, key):
        # Of each part every device takes its share: neighbouring examples may stand on one.
        parts = jax.tree.map(
            lambda x: constrain(x.reshape(accumulate_steps, -1, *x.shape[1:]), (None, "batch")),
            batch,
        )
        keys = jax.random.split(key, accumulate_steps)
        weights = jax.vmap(weight_of)(parts)
        shares = weights / jnp.maximum(weights.sum(), 1)

        def add(total, given):
            share, part, key = given
            new = at_once(params, part, key)
            return jax.tree.map(lambda x, y: x + (share * y).astype(x.dtype), total, new), None

        shapes = jax.eval_shape(at_once, params, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (shares, parts, keys))[0]

    def gradients(state: TrainState, batch: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(state.key, state.step)
        take = at_once if accumulate_steps == 1 else accumulated
        return take(state.params, batch, key)

    def update(state: TrainState, given: tuple[Any, Any]) -> tuple[TrainState, StepMetrics]:
        grads, loss = given
        grad_norm = optax.tree.norm(grads)
        bad = ~(jnp.isfinite(loss.total) & jnp.isfinite(grad_norm))

        def new(grads, old):
            params, opt_state, ema = old
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            if ema_decay is not None:
                # The average forgets its random start first, then settles.
                decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
                ema = optax.incremental_update(params, ema, 1.0 - decay)
            return params, opt_state, ema

        updates = updates_made(state.opt_state)
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = _unless(bad, new, grads, old)
        bad_steps = jnp.where(bad, state.bad_steps + 1, 0)
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + bad,
            bad_steps=bad_steps,
            params=params,
            opt_state=opt_state,
            ema=ema,
            key=state.key,
        )
        return state, StepMetrics(loss, grad_norm, bad_steps, updates)

    return TrainStep(gradients, update)


def _unless(bad: Bool[Array, ""], update: Callable[[Any, Any], Any], grads: Any, old: Any) -> Any:
    """update(grads, old), or old."""
    if not on_cpu():  # where the host would have to wait for the number of rounds
        new = update(grads, old)
        return jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, old)

    def once(i, old):
        # Or XLA would take what is made of gradients alone out of the loop, into memory.
        varying = jax.tree.map(lambda x: jnp.where(i == 0, x, 0), grads)
        return update(varying, old)

    # In place: the choice above copies the optimizer state there.
    return jax.lax.fori_loop(0, jnp.where(bad, 0, 1), once, old)
