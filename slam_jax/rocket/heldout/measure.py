"""What a worker measures for the protocol `heldout`: training, test scores, times."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slam_jax.array_typing import AnyArray
from slam_jax.generation.decode import greedy_decode
from slam_jax.language_models import measure
from slam_jax.language_models.flops import training_flops
from slam_jax.rocket.heldout.corpus import Rows, load_corpus
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.tasks import Json, Report
from slam_jax.rocket.timing import compiled, peak_memory, timed
from slam_jax.rocket.training import build_model, start_training
from slam_jax.training.losses import language_model_loss, token_losses
from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
from slam_jax.training.state import merge_model

_Document = Int[np.ndarray, "_"]


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
    data = load_corpus(Path(corpus))
    config = settings.config_of(name, data.tokenizer.vocab_size)
    tokens_per_step = settings.batch_size * settings.length
    num_steps = num_tokens // tokens_per_step
    graphdef, step, state = start_training(
        build_model(config, seed),
        language_model_loss,
        make_optimizer(_optimizer(settings, learning_rate, num_steps), num_steps),
        seed,
    )
    score = _scorer(graphdef, settings, data.tokenizer.token_bytes)
    rows = Rows(data.train, settings.length, seed)
    validation = list(data.validation.documents(settings.document_tokens // 2))
    num_points = settings.curve_points if test else 1
    points = {round(num_steps * (i + 1) / num_points) for i in range(num_points)}
    flops = training_flops(config, settings.length) * settings.batch_size
    losses, curve, start = [], [], time.perf_counter()
    for i in range(num_steps):
        state, metrics = step(state, rows(i, settings.batch_size))
        losses.append(metrics.loss.cross_entropy)
        if i + 1 in points:
            losses = [float(loss) for loss in losses]
            scores = score(state.params, validation)
            point: Json = {"tokens": (i + 1) * tokens_per_step, "flops": (i + 1) * flops}
            since = curve[-1]["step"] if curve else 0
            point["train_loss"] = float(np.mean(losses[since:]))
            point["validation_loss"] = sum(scores["nats"]) / sum(scores["tokens"])
            curve.append({**point, "step": i + 1})
            report(0.95 * (i + 1) / num_steps, f"loss {point['validation_loss']:.3f}")
    seconds, documents = time.perf_counter() - start, settings.document_tokens
    return {
        "curve": curve,
        "validation_loss": curve[-1]["validation_loss"],
        "stability": stability(losses),
        "skipped_updates": int(state.skipped),
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "test": score(state.params, data.test.documents(documents)) if test else None,
    }


def _optimizer(settings: HeldoutSettings, rate: float, num_steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=rate,
        warmup_steps=round(settings.warmup * num_steps),
        final_fraction=0.1,
        weight_decay=settings.weight_decay,
    )


def stability(losses: list[float]) -> float:
    """1 / (1 + s), s the standard deviation of the change of the loss from one update to the next,
    in nats, over the second half of a run. All systems see the same batches, so that differences
    between batches affect all of them alike."""
    changes = np.diff(losses[len(losses) // 2 :])
    return 1.0 / (1.0 + float(np.std(changes))) if len(changes) else 1.0


def _scorer(
    graphdef: nnx.GraphDef, settings: HeldoutSettings, token_bytes: list[bytes]
) -> Callable[[Any, Iterable[_Document]], Json]:
    """`score_documents` of parameters and documents, compiled once."""
    predict = jax.jit(lambda params, tokens: _predict(merge_model(graphdef, params), tokens))
    return lambda params, documents: score_documents(
        lambda tokens: predict(params, tokens), documents, settings, token_bytes
    )


def score_documents(
    predict: Callable[[Int[np.ndarray, "B T_1"]], Float[AnyArray, "B 3 T"]],
    documents: Iterable[_Document],
    settings: HeldoutSettings,
    token_bytes: list[bytes],
) -> Json:
    """One number per document: nats, tokens predicted first and among the first five, and how many
    tokens and bytes were predicted."""
    documents = list(documents)
    sizes = np.array([len(each) for each in token_bytes])
    totals = {name: [0.0] * len(documents) for name in ("nats", "top1", "top5")}
    for owners, tokens, counts in _windows(documents, settings):
        predicted = np.asarray(predict(tokens), np.float64)
        for i, owner in enumerate(owners):
            for name, values in zip(totals, predicted[i], strict=True):
                totals[name][owner] += float(values[: counts[i]].sum())
    return {
        **totals,
        "tokens": [len(each) - 1 for each in documents],
        "bytes": [int(sizes[each[1:]].sum()) for each in documents],
    }


def _windows(
    documents: list[_Document], settings: HeldoutSettings
) -> Iterator[tuple[list[int], Int[np.ndarray, "B T_1"], list[int]]]:
    """Batches of rows: the document of each row, its tokens, and how many of them are predicted.

    A row begins with the last token of the row before. Padding comes last and changes nothing.
    """
    length, batch_size = settings.length, settings.batch_size
    rows = [
        (owner, document[start : start + length + 1])
        for owner, document in enumerate(documents)
        for start in range(0, len(document) - 1, length)
    ]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        tokens = np.zeros((batch_size, length + 1), np.int32)
        for i, (_, row) in enumerate(batch):
            tokens[i, : len(row)] = row
        yield [owner for owner, _ in batch], tokens, [len(row) - 1 for _, row in batch]


def _predict(model: Any, tokens: Int[Array, "B T_1"]) -> Float[Array, "B 3 T"]:
    """For every token after the first: its nats, whether it was predicted first, and whether it was
    among the first five."""
    logits, targets = model(tokens[:, :-1]).logits, tokens[:, 1:]
    nats = token_losses(logits, targets).cross_entropy
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    better = jnp.sum(logits > chosen, axis=-1)
    return jnp.stack([nats, jnp.float32(better < 1), jnp.float32(better < 5)], axis=1)


def size(name: str, settings: HeldoutSettings, vocab_size: int) -> Json:
    """Parameters, operations, cache and widths of a system at the budget."""
    config = settings.config_of(name, vocab_size)
    measured = measure(config)
    widths = ("embed_dim", "num_heads", "mlp_dim", "expert_dim")
    return {
        "parameters": {
            "total": measured.total,
            "active": measured.active,
            "embedding": measured.embedding,
            "active_non_embedding": measured.active - measured.embedding,
        },
        "training_flops_per_token": training_flops(config, settings.length) / settings.length,
        "cache_bytes_per_token": measured.cache_bytes_per_token,
        "state_bytes": measured.state_bytes,
        "widths": {field: getattr(config, field) for field in widths if hasattr(config, field)},
    }


def time_system(name: str, settings: HeldoutSettings, report: Report, *, corpus: str) -> Json:
    """Seconds of generation and of training steps, in one of several processes of a system.

    Compilation of the training step is timed too, and therefore does not use the cache.
    """
    data = load_corpus(Path(corpus))
    config = settings.config_of(name, data.tokenizer.vocab_size)
    seconds = _time_generation(build_model(config, 0), data.train, settings, report)
    report(0.8, "training")
    _, step, state = start_training(
        build_model(config, 0), language_model_loss, make_optimizer(OptimizerConfig(), 1_000), 0
    )
    batch = jnp.asarray(Rows(data.train, settings.length, 0)(0, settings.batch_size))
    executable, compile_seconds = compiled(step, state, batch)

    def one_step() -> Any:
        nonlocal state
        state, metrics = executable(state, batch)
        return metrics

    seconds["training_step"] = timed(one_step, settings.repeats)
    return {"seconds": seconds, "compile_seconds": compile_seconds}


def _time_generation(
    model: Any, text: Int[np.ndarray, "N"], settings: HeldoutSettings, report: Report
) -> dict[str, list[float]]:
    """Seconds to the first token and of a whole generation, at batches of 1 and 8."""
    seconds = {}
    for batch_size in (1, 8):
        report(0.1 * batch_size, f"generating, batches of {batch_size}")
        prompts = jnp.asarray(text[: batch_size * settings.prompt_length]).reshape(batch_size, -1)
        lengths = jnp.full((batch_size,), settings.prompt_length)
        for what, new_tokens in (("first_token", 1), ("generation", 1 + settings.new_tokens)):

            def generate(model, prompts, n=new_tokens, lengths=lengths):
                # No token ends a row.
                return greedy_decode(
                    model, None, prompts, lengths, max_new_tokens=n, eos_id=-1, pad_id=0
                )

            run = jax.jit(generate)
            seconds[f"{what}_{batch_size}"] = timed(
                lambda run=run, prompts=prompts: run(model, prompts), settings.repeats
            )
    return seconds
