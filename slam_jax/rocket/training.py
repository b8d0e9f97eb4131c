"""How every protocol builds a language model and its training step."""

from typing import Any

import jax
import optax
from flax import nnx

from slam_jax.language_models import make_model
from slam_jax.training.state import init_state, make_train_step, split_model


def build_model(config: Any, seed: int) -> Any:
    return jax.jit(lambda: make_model(config, rngs=nnx.Rngs(seed)))()


def start_training(
    model: Any, loss: Any, optimizer: optax.GradientTransformation, seed: int
) -> tuple[nnx.GraphDef, Any, Any]:
    """The graph definition, the jitted step and the initial state, which the step donates.

    The caller must not keep `model`: its parameters are part of the donated state.
    """
    graphdef, params = split_model(model)
    step = jax.jit(make_train_step(graphdef, loss, optimizer), donate_argnums=0)
    return graphdef, step, init_state(params, optimizer, jax.random.key(seed), ema=False)
