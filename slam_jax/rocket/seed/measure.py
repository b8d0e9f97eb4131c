"""The published comparison, repeated: a few updates on one batch of random tokens.

It measures how fast a model learns one batch by heart. The published figures measure the same:
every accuracy among them is a whole number of 1/1024, and one batch has 8 x 128 = 1024 tokens. A
high rank here says nothing about language.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slam_jax.language_models import make_config
from slam_jax.language_models.flops import forward_flops, training_flops
from slam_jax.rocket.machine import peak_memory, spread, timed
from slam_jax.rocket.systems import build_model, sizes, start_training
from slam_jax.rocket.tasks import Json, Report, check_settings
from slam_jax.training.losses import language_model_loss
from slam_jax.training.state import merge_model


@dataclasses.dataclass(frozen=True)
class SeedSettings:
    """The published settings, and values for what was not published.

    num_updates: loss and accuracy are measured before each update and after the last one, without
      dropout. The published number is unknown; 5 epochs of one batch are 5, the published figures
      of SLAM v6 take about six.
    weight_decay: of AdamW. seed: of parameters, tokens and dropout.
    rounds, repeats: inference is timed in `rounds` processes, `repeats` times in each.
    stress_batch, stress_length: the first level of the stress test. Both double until a forward
      pass takes more than `stress_seconds` or the process exceeds its memory limit.
    preset: of the registry; "tiny" is for tests.
    """

    preset: str = "seed"
    batch_size: int = 8
    length: int = 128
    learning_rate: float = 5e-5
    num_updates: int = 10
    weight_decay: float = 0.01
    seed: int = 0
    rounds: int = 3
    repeats: int = 3
    stress_batch: int = 16
    stress_length: int = 128
    stress_seconds: float = 4.0

    def __post_init__(self):
        check_settings(self, zero=("seed", "weight_decay"), large=("seed",))


def learn(name: str, settings: SeedSettings, report: Report) -> Json:
    """Trains a system on the batch; everything but the timed inference and the stress test."""
    config = make_config(name, settings.preset)
    size = sizes(config)
    report(0.05, "building")
    batch, other_batch = _tokens(config, settings)
    graphdef, step, state = start_training(
        config,
        # Without the dropout key: the one system with dropout would learn the batch more slowly.
        lambda model, batch, key: language_model_loss(model, batch),
        optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay),
        settings.seed,
    )
    losses, accuracies, seconds = [], [], []
    for i in range(settings.num_updates):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics.loss.cross_entropy))
        accuracies.append(float(metrics.loss.accuracy))
        share = (i + 1) / settings.num_updates
        report(0.1 + 0.8 * share, f"update {i + 1}, loss {losses[-1]:.2f}")
    memory, evaluate = peak_memory(), jax.jit(language_model_loss)
    trained = merge_model(graphdef, state.params)
    after, other = (evaluate(trained, tokens) for tokens in (batch, other_batch))
    losses.append(float(after.cross_entropy))
    accuracies.append(float(after.accuracy))
    return {
        **size,
        "forward_flops": settings.batch_size * forward_flops(config, settings.length),
        "training_flops": settings.batch_size * training_flops(config, settings.length),
        "losses": losses,
        "accuracies": accuracies,
        "top1": accuracies[-1],
        "top1_fresh": float(other.accuracy),
        "loss_fresh": float(other.cross_entropy),
        "stability": stability(losses),
        "first_step_seconds": seconds[0],
        "training_step": spread(seconds[1:] or seconds),
        "peak_memory_bytes": memory,
    }


def time_inference(name: str, settings: SeedSettings, report: Report) -> Json:
    """Seconds of forward passes over the batch, in one of several processes of a system."""
    config = make_config(name, settings.preset)
    model = build_model(config, settings.seed)
    tokens, _ = _tokens(config, settings)
    report(0.3, "timing")
    forward = jax.jit(lambda model, tokens: model(tokens).logits)
    return {"seconds": timed(lambda: forward(model, tokens[:, :-1]), settings.repeats)}


def stability(losses: list[float]) -> float:
    """1 / (1 + s), s the standard deviation of the losses.

    The published rule is unknown; with losses that fall evenly over five epochs, this rule comes
    close to the published figures. A model that learns nothing has the highest stability.
    """
    return 1.0 / (1.0 + float(np.std(losses)))


def _tokens(config: Any, settings: SeedSettings) -> tuple[jax.Array, jax.Array]:
    """The batch and a second one that is never trained on; each [batch_size, length + 1]."""
    shape = (2, settings.batch_size, settings.length + 1)
    drawn = np.random.default_rng(settings.seed).integers(0, config.vocab_size, shape, np.int32)
    return jnp.asarray(drawn[0]), jnp.asarray(drawn[1])


def stress(name: str, settings: SeedSettings, report: Report) -> Iterator[Json]:
    """Forward passes over twice the batch and twice the length each time, until one is too slow,
    the context is full, or the process is ended for its memory. Yields all levels so far."""
    config = make_config(name, settings.preset)
    model = build_model(config, settings.seed)
    batch_size, length = settings.stress_batch, settings.stress_length
    forward = jax.jit(lambda model, tokens: jnp.mean(model(tokens).logits))
    seconds, levels = 0.0, []
    while seconds <= settings.stress_seconds and length <= config.context_length:
        report(0.5, f"{batch_size} x {length}")
        # Random tokens, because a mixture sends equal tokens to the same experts.
        rng = np.random.default_rng(settings.seed)
        tokens = rng.integers(0, config.vocab_size, (batch_size, length), np.int32)
        seconds = min(timed(lambda tokens=tokens: forward(model, tokens), 1))
        levels.append({"batch_size": batch_size, "length": length, "seconds": seconds})
        yield {"levels": [*levels]}
        batch_size, length = 2 * batch_size, 2 * length
