"""What a worker measures for the protocol `heldout`: training, test scores, times."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slam_jax.array_typing import AnyArray
from slam_jax.generation.decode import greedy_decode
from slam_jax.language_models.flops import training_flops
from slam_jax.rocket.heldout.corpus import load_corpus, training_rows
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.machine import compiled, peak_memory, timed
from slam_jax.rocket.systems import build_model, start_training
from slam_jax.rocket.tasks import Json, Report
from slam_jax.training.losses import language_model_loss, token_losses
from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
from slam_jax.training.state import merge_model


def train(
    name: str,
    settings: HeldoutSettings,
    report: Report,
    *,
    corpus: str,
    learning_rate: float,
    seed: int,
    num_tokens: int,
    test: bool,
) -> Json:
    """One training run: its curve and cost, and with `test` the scores of every test document.
    Without `test` it only tries a learning rate, and its curve has one point."""
    data, length, batch_size = load_corpus(Path(corpus)), settings.length, settings.batch_size
    config = settings.config_of(name, data.tokenizer.vocab_size)
    num_steps = num_tokens // (batch_size * length)
    optimizer = OptimizerConfig(
        learning_rate=learning_rate,
        warmup_steps=round(settings.warmup * num_steps),
        final_fraction=0.1,
        weight_decay=settings.weight_decay,
    )
    graphdef, step, state = start_training(
        config, language_model_loss, make_optimizer(optimizer, num_steps), seed
    )
    predict = jax.jit(lambda params, tokens: _predict(merge_model(graphdef, params), tokens))

    def score(params: Any, split: str, most: int) -> Json:
        documents, token_bytes = data.documents(split, most), data.tokenizer.token_bytes
        return score_documents(partial(predict, params), documents, settings, token_bytes)

    num_points = settings.curve_points if test else 1
    points = {round(num_steps * (i + 1) / num_points) for i in range(num_points)}
    flops = training_flops(config, length) * batch_size
    losses, curve, start = [], [], time.perf_counter()
    for i in range(1, num_steps + 1):
        rows = training_rows(data.arrays["train"], length, seed, i - 1, batch_size)
        state, metrics = step(state, rows)
        losses.append(metrics.loss.cross_entropy)
        if i in points:
            losses = [float(loss) for loss in losses]
            scores = score(state.params, "validation", settings.document_tokens // 2)
            since = curve[-1]["step"] if curve else 0
            point: Json = {"tokens": i * batch_size * length, "flops": i * flops, "step": i}
            point["train_loss"] = float(np.mean(losses[since:]))
            point["validation_loss"] = sum(scores["nats"]) / sum(scores["tokens"])
            curve.append(point)
            report(0.95 * i / num_steps, f"loss {point['validation_loss']:.3f}")
    return {
        "curve": curve,
        "validation_loss": curve[-1]["validation_loss"],
        "stability": stability(losses),
        "skipped_updates": int(state.skipped),
        "train_seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory(),
        "test": score(state.params, "test", settings.document_tokens) if test else None,
    }


def stability(losses: list[float]) -> float:
    """1 / (1 + s), s the standard deviation of the change of the loss from one update to the next,
    in nats, over the second half of a run. All systems see the same batches, so that differences
    between batches affect all of them alike."""
    changes = np.diff(losses[len(losses) // 2 :])
    return 1.0 / (1.0 + float(np.std(changes))) if len(changes) else 1.0


def score_documents(
    predict: Callable[[Int[np.ndarray, "B T_1"]], Float[AnyArray, "B 3 T"]],
    documents: Iterable[Int[np.ndarray, "_"]],
    settings: HeldoutSettings,
    token_bytes: list[bytes],
) -> Json:
    """One number per document: nats, tokens predicted first and among the first five, and how many
    tokens and bytes were predicted."""
    documents, length, batch_size = list(documents), settings.length, settings.batch_size
    sizes = np.array([len(each) for each in token_bytes])
    # A row begins with the last token of the row before. Padding comes last and changes nothing.
    rows = [
        (owner, document[start : start + length + 1])
        for owner, document in enumerate(documents)
        for start in range(0, len(document) - 1, length)
    ]
    totals = np.zeros((3, len(documents)))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        tokens = np.zeros((batch_size, length + 1), np.int32)
        for i, (_, row) in enumerate(batch):
            tokens[i, : len(row)] = row
        predicted = np.asarray(predict(tokens), np.float64)
        for i, (owner, row) in enumerate(batch):
            totals[:, owner] += predicted[i, :, : len(row) - 1].sum(axis=1)
    return {
        **dict(zip(("nats", "top1", "top5"), totals.tolist(), strict=True)),
        "tokens": [len(each) - 1 for each in documents],
        "bytes": [int(sizes[each[1:]].sum()) for each in documents],
    }


def _predict(model: Any, tokens: Int[Array, "B T_1"]) -> Float[Array, "B 3 T"]:
    """For every token after the first: its nats, whether it was predicted first, and whether it was
    among the first five."""
    logits, targets = model(tokens[:, :-1]).logits, tokens[:, 1:]
    nats = token_losses(logits, targets).cross_entropy
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    better = jnp.sum(logits > chosen, axis=-1)
    return jnp.stack([nats, jnp.float32(better < 1), jnp.float32(better < 5)], axis=1)


def time_system(name: str, settings: HeldoutSettings, report: Report, *, corpus: str) -> Json:
    """Seconds of generation and of training steps, in one of several processes of a system: to the
    first token and of a whole generation, at batches of 1 and 8.

    Compilation of the training step is timed too, and therefore does not use the cache.
    """
    data = load_corpus(Path(corpus))
    text, config = data.arrays["train"], settings.config_of(name, data.tokenizer.vocab_size)
    model, seconds = build_model(config, 0), {}
    for batch_size in (1, 8):
        report(0.1 * batch_size, f"generating, batches of {batch_size}")
        prompts = jnp.asarray(text[: batch_size * settings.prompt_length]).reshape(batch_size, -1)
        lengths = jnp.full((batch_size,), settings.prompt_length)
        for what, new_tokens in (("first_token", 1), ("generation", 1 + settings.new_tokens)):
            # No token ends a row.
            limits: Any = dict(max_new_tokens=new_tokens, eos_id=-1, pad_id=0)
            generate = jax.jit(partial(greedy_decode, **limits))
            seconds[f"{what}_{batch_size}"] = timed(
                partial(generate, model, None, prompts, lengths), settings.repeats
            )
    report(0.8, "training")
    optimizer = make_optimizer(OptimizerConfig(), 1_000)
    _, step, state = start_training(config, language_model_loss, optimizer, 0)
    batch = jnp.asarray(training_rows(text, settings.length, 0, 0, settings.batch_size))
    executable, compile_seconds = compiled(step, state, batch)

    def one_step() -> Any:
        nonlocal state
        state, metrics = executable(state, batch)
        return metrics

    seconds["training_step"] = timed(one_step, settings.repeats)
    return {"seconds": seconds, "compile_seconds": compile_seconds}
