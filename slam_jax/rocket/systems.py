"""How every protocol counts, builds and trains a language model."""

from typing import Any

import jax
import optax
from flax import nnx

from slam_jax.language_models import make_model, measure
from slam_jax.rocket.tasks import Json
from slam_jax.training.state import init_state, make_train_step, split_model


def sizes(config: Any) -> Json:
    """Parameters, cache and other state of a system, as its row has them."""
    size = measure(config)
    parameters = {"total": size.total, "active": size.active, "embedding": size.embedding}
    return {
        "parameters": {**parameters, "active_non_embedding": size.active - size.embedding},
        "cache_bytes_per_token": size.cache_bytes_per_token,
        "state_bytes": size.state_bytes,
    }


def build_model(config: Any, seed: int) -> Any:
    return jax.jit(lambda: make_model(config, rngs=nnx.Rngs(seed)))()


def start_training(
    config: Any, loss: Any, optimizer: optax.GradientTransformation, seed: int
) -> tuple[nnx.GraphDef, Any, Any]:
    """The graph definition, the jitted step and the initial state, which the step donates."""
    graphdef, params = split_model(build_model(config, seed))
    step = jax.jit(make_train_step(graphdef, loss, optimizer), donate_argnums=0)
    return graphdef, step, init_state(params, optimizer, jax.random.key(seed), ema=False)
