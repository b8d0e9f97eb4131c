"""Our arms: a model as a user of this library would run it.

Libraries are imported where they are used, so that each process has only those of its arm.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Call = Callable[[], Any]
LEARNING_RATE, WEIGHT_DECAY = 5e-5, 0.01  # of AdamW, everywhere; the rest is at its defaults


def save_weights(folder: str, system: str, preset: str, **changes: Any) -> None:
    """Saves a new model in its publisher's format, which both sides can load."""
    import jax
    from flax import nnx

    from slam_jax.interop import save_pretrained
    from slam_jax.language_models import make_config, make_model

    config = make_config(system, preset, **changes)
    save_pretrained(jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))(), folder)


def tokens(vocab_size: int, *shape: int) -> np.ndarray:
    """Random tokens, the same in all arms."""
    return np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)


def forward(folder: str, rows: int, length: int, **dtypes: Any) -> Call:
    """Logits [rows, length, V]."""
    import jax

    graphdef, params, config = _load(folder, **dtypes)
    given = tokens(config.vocab_size, rows, length)
    run = jax.jit(lambda params, given: _merge(graphdef, params)(given).logits)
    return lambda: run(params, given)


def training_step(folder: str, rows: int, length: int, **dtypes: Any) -> Call:
    """A training step with AdamW; returns the cross-entropy before the update."""
    graphdef, params, config = _load(folder, **dtypes)
    given = tokens(config.vocab_size, rows, length + 1)
    return repeated(*make_step(graphdef, params), given)


def repeated(step: Any, state: Any, batch: Any) -> Call:
    """One more training step on the same batch; returns the loss before the update."""

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics.loss.total

    return call


def make_step(graphdef: Any, params: Any, loss: Any = None) -> tuple[Any, Any]:
    """The jitted step of a model, and its first state. loss: that of `make_train_step`, None = of a
    language model."""
    import jax
    import optax

    from slam_jax.training.losses import language_model_loss
    from slam_jax.training.state import init_state, make_train_step

    def cross_entropy(model, given, key):
        # Without the load balancing loss, which the peers leave out by default.
        parts = language_model_loss(model, given)
        return parts._replace(total=parts.cross_entropy)

    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    pure = make_train_step(graphdef, loss or cross_entropy, optimizer)
    step = jax.jit(pure, donate_argnums=0)
    return step, init_state(params, optimizer, jax.random.key(0), ema=False)


def decoding(folder: str, context: int, room: int, rows: int = 1, **dtypes: Any) -> Call:
    """Logits [rows, V] of one more token after `context` tokens; the cache has room for `room`
    calls."""
    import jax

    graphdef, params, config = _load(folder, **dtypes)
    given = tokens(config.vocab_size, rows, context + 1)

    def prefill(params, given):
        model = _merge(graphdef, params)
        _, cache = model.prefill(given, model.init_cache((rows,), context + room))
        return cache

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, token, cache):
        return _merge(graphdef, params).decode_step(token, cache)

    cache = jax.jit(prefill)(params, given[:, :-1])

    def call():
        nonlocal cache
        logits, cache = step(params, given[:, -1], cache)
        return logits

    return call


def _load(folder: str, **dtypes: Any) -> tuple[Any, Any, Any]:
    from slam_jax.interop import load_pretrained
    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.training.state import split_model

    enable_compile_cache()
    model, config = load_pretrained(folder, **dtypes)
    return *split_model(model), config


def _merge(graphdef: Any, params: Any) -> Any:
    from slam_jax.training.state import merge_model

    return merge_model(graphdef, params)
