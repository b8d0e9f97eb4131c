"""The comparison that can rank architectures: real text, documents held out, equal budgets.

Every system is built at the width at which it meets one budget, reads the same tokens in the same
order, and is tried with the same learning rates, of which the validation split chooses one. Then it
is trained so from several seeds and predicts the test documents.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slam_jax.array_typing import AnyArray
from slam_jax.errors import require, require_count
from slam_jax.generation.decode import greedy_decode
from slam_jax.language_models import make_model, measure
from slam_jax.language_models.flops import training_flops
from slam_jax.rocket.heldout.budgets import BUDGETS, Budget, fit
from slam_jax.rocket.heldout.corpus import STDLIB, Rows, load_corpus
from slam_jax.rocket.timing import compiled, peak_memory, timed
from slam_jax.training.losses import language_model_loss
from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
from slam_jax.training.state import init_state, make_train_step, merge_model, split_model
from slam_jax.training.token_losses import token_losses

Json = dict[str, Any]
Tell = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class HeldoutSettings:
    """What is compared, on what, and how long.

    text: "stdlib", the source text of the interpreter's standard library; "tfds:NAME"; or a folder
      of text files. vocab_size: of the tokenizer, learned from its training documents.
    budget: of "parameters" (active, without tables and head) or training "flops" a token.
    length, batch_size: of a batch, in tokens and rows. num_tokens: that a run reads.
    learning_rates: each is tried with the first of `seeds` over `sweep_tokens`, as a run of that
      length; the one with the lowest validation loss is used. While that is the lowest or the
      highest tried, the next one beyond is tried, too: at most `more_learning_rates`.
    seeds: of runs, each its own parameters, order of rows and dropout.
    weight_decay, warmup: of AdamW with a cosine; warmup is a share of the run.
    document_tokens: so many of each held-out document are predicted, in rows of `length`.
    curve_points: evaluations on the validation documents along a run; one that tries a learning
      rate has but the last.
    prompt_length, new_tokens: of the timed generation. rounds, repeats: timings are taken in so
      many processes, in turns, so often in each.
    """

    text: str = STDLIB
    vocab_size: int = 2_048
    budget_of: str = "parameters"
    budget: float = 4e6
    length: int = 128
    batch_size: int = 16
    num_tokens: int = 1 << 20
    learning_rates: Sequence[float] = (7e-4, 2e-3, 6e-3)
    more_learning_rates: int = 2
    sweep_tokens: int = 1 << 18
    seeds: Sequence[int] = (0, 1, 2)
    weight_decay: float = 0.1
    warmup: float = 0.1
    document_tokens: int = 2_048
    curve_points: int = 8
    prompt_length: int = 64
    new_tokens: int = 64
    rounds: int = 3
    repeats: int = 3

    def __post_init__(self):
        for field in ("learning_rates", "seeds"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            values = getattr(self, field)
            require(0 < len(values) == len(set(values)), field, values, "some, all different")
        counts = ("length", "batch_size", "document_tokens", "prompt_length", "new_tokens")
        for field in (*counts, "rounds", "repeats", "curve_points"):
            require_count(field, getattr(self, field))
        for field in ("num_tokens", "sweep_tokens"):
            value, least = getattr(self, field), self.curve_points * self.batch_size * self.length
            expected = f"at least {least:,}, a batch for each of the curve_points"
            require(value >= least, field, value, expected)
        require_count("more_learning_rates", self.more_learning_rates, least=0, most=16)
        for seed in self.seeds:
            require_count("seeds", seed, least=0, most=2**32 - 1)
        require(all(x > 0 for x in self.learning_rates), "learning_rates", self.learning_rates,
                "numbers above 0")  # fmt: skip
        require(self.budget_of in BUDGETS, "budget_of", self.budget_of, f"one of {BUDGETS}")
        require(self.budget > 0, "budget", self.budget, "a number above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a share in [0, 1)")

    def config_of(self, name: str, vocab_size: int) -> Any:
        """The system at its size in this comparison."""
        return fit(name, Budget(self.budget_of, self.budget), self.length, vocab_size)


def train(
    name: str,
    settings: HeldoutSettings,
    tell: Tell,
    *,
    corpus: str,
    learning_rate: float,
    seed: int,
    num_tokens: int,
    test: bool,
) -> Json:
    """One run: its curve, and with `test` what it says of each test document."""
    data = load_corpus(Path(corpus))
    config = settings.config_of(name, data.tokenizer.vocab_size)
    graphdef, params = split_model(_build(config, seed))
    num_steps = num_tokens // (settings.batch_size * settings.length)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=learning_rate,
            warmup_steps=round(settings.warmup * num_steps),
            final_fraction=0.1,
            weight_decay=settings.weight_decay,
        ),
        num_steps,
    )
    step = jax.jit(make_train_step(graphdef, language_model_loss, optimizer), donate_argnums=0)
    state = init_state(params, optimizer, jax.random.key(seed), ema=False)
    del params  # donated with the state
    rows = Rows(data.train, settings.length, seed)
    predict = jax.jit(lambda params, tokens: _predict(merge_model(graphdef, params), tokens))

    def held_out(documents: Iterable[Int[np.ndarray, "_"]], params: Any) -> Json:
        return score_documents(
            lambda tokens: predict(params, tokens), documents, settings, data.tokenizer.token_bytes
        )

    validation = list(data.validation.documents(settings.document_tokens // 2))
    num_points = settings.curve_points if test else 1  # one that only tries a rate has no curve
    points = {round(num_steps * (i + 1) / num_points) for i in range(num_points)}
    flops = training_flops(config, settings.length) * settings.batch_size
    losses: list[Any] = []
    curve, start = [], time.perf_counter()
    for i in range(num_steps):
        state, metrics = step(state, rows(i, settings.batch_size))
        losses.append(metrics.loss.cross_entropy)
        if i + 1 in points:
            losses = [float(loss) for loss in losses]
            told = held_out(validation, state.params)
            curve.append(
                {
                    "tokens": (i + 1) * settings.batch_size * settings.length,
                    "flops": (i + 1) * flops,
                    "train_loss": float(np.mean(losses[curve[-1]["step"] if curve else 0 :])),
                    "validation_loss": sum(told["nats"]) / sum(told["tokens"]),
                    "step": i + 1,
                }
            )
            tell(0.95 * (i + 1) / num_steps, f"loss {curve[-1]['validation_loss']:.3f}")
    seconds = time.perf_counter() - start
    return {
        "curve": curve,
        "validation_loss": curve[-1]["validation_loss"],
        "stability": stability(losses),
        "skipped_updates": int(state.skipped),
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "test": held_out(data.test.documents(settings.document_tokens), state.params)
        if test
        else None,
    }


def stability(losses: list[float]) -> float:
    """1 / (1 + s), s the standard deviation of the change of the loss from one update to the next,
    in nats, over the second half of a run. Batches are the same for all systems, so that what comes
    of their differences does too."""
    changes = np.diff(losses[len(losses) // 2 :])
    return 1.0 / (1.0 + float(np.std(changes))) if len(changes) else 1.0


def score_documents(
    predict: Callable[[Int[np.ndarray, "B T_1"]], Float[AnyArray, "B 3 T"]],
    documents: Iterable[Int[np.ndarray, "_"]],
    settings: HeldoutSettings,
    token_bytes: list[bytes],
) -> Json:
    """Of each document: nats, right first and among the first five, tokens and bytes predicted."""
    documents = list(documents)
    sizes = np.array([len(each) for each in token_bytes])
    totals = {name: [0.0] * len(documents) for name in ("nats", "top1", "top5")}
    for owners, tokens, real in _windows(documents, settings):
        told = np.asarray(predict(tokens), np.float64)
        for i, owner in enumerate(owners):
            for name, values in zip(totals, told[i], strict=True):
                totals[name][owner] += float(values[: real[i]].sum())
    return {
        **totals,
        "tokens": [len(each) - 1 for each in documents],
        "bytes": [int(sizes[each[1:]].sum()) for each in documents],
    }


def _windows(
    documents: list[Int[np.ndarray, "_"]], settings: HeldoutSettings
) -> Iterator[tuple[list[int], Int[np.ndarray, "B T_1"], list[int]]]:
    """Batches of rows, the document of each, and how many tokens of it are predicted.

    A row begins with the last token of the one before; pads come last, where they change nothing.
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
    """Of each token after the first: its nats, whether it was the first choice, one of five."""
    logits, targets = model(tokens[:, :-1]).logits, tokens[:, 1:]
    nats = token_losses(logits, targets).cross_entropy
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    better = jnp.sum(logits > chosen, axis=-1)
    return jnp.stack([nats, jnp.float32(better < 1), jnp.float32(better < 5)], axis=1)


def size(name: str, settings: HeldoutSettings, vocab_size: int) -> Json:
    """What the system spends, and how wide it is for it."""
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


def time_system(name: str, settings: HeldoutSettings, tell: Tell, *, corpus: str) -> Json:
    """Seconds of training steps, prompts and generation; one of several visits of a system.

    Programs are compiled anew, not taken from a cache, so that compiling is timed too.
    """
    data = load_corpus(Path(corpus))
    config = settings.config_of(name, data.tokenizer.vocab_size)
    model = _build(config, 0)
    seconds: dict[str, list[float]] = {}
    for batch_size in (1, 8):
        tell(0.1 * batch_size, f"generating, batches of {batch_size}")
        prompts = jnp.asarray(data.train[: batch_size * settings.prompt_length])
        prompts = prompts.reshape(batch_size, -1)
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
    tell(0.8, "training")
    graphdef, params = split_model(model)
    del model
    optimizer = make_optimizer(OptimizerConfig(), 1_000)
    step = jax.jit(make_train_step(graphdef, language_model_loss, optimizer), donate_argnums=0)
    state = init_state(params, optimizer, jax.random.key(0), ema=False)
    del params
    batch = jnp.asarray(Rows(data.train, settings.length, 0)(0, settings.batch_size))
    program, compile_seconds = compiled(step, state, batch)

    def one_more() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    seconds["training_step"] = timed(one_more, settings.repeats)
    return {"seconds": seconds, "compile_seconds": compile_seconds}


def _build(config: Any, seed: int) -> Any:
    return jax.jit(lambda: make_model(config, rngs=nnx.Rngs(seed)))()


def rate_label(rate: float) -> str:
    """Of the task that tries a learning rate."""
    return f"learning rate {rate:g}"


def seed_label(seed: int) -> str:
    """Of the task that trains from a seed."""
    return f"seed {seed}"


def validation_losses(
    done: Mapping[str, Json], settings: HeldoutSettings
) -> dict[float, float | None]:
    """Of each learning rate that was tried; None for one whose run failed."""
    return {
        rate: done[rate_label(rate)].get("validation_loss") for rate in rates_to_try(done, settings)
    }


def rates_to_try(done: Mapping[str, Json], settings: HeldoutSettings) -> list[float]:
    """The learning rates of the settings in their order, and those that follow from `done`: while
    the best is at an end of all that were tried, one beyond it, as far away as its neighbour."""
    rates = list(settings.learning_rates)
    for _ in range(settings.more_learning_rates if len(rates) > 1 else 0):
        if any(rate_label(rate) not in done for rate in rates):
            break
        best = choose_learning_rate(
            {rate: done[rate_label(rate)].get("validation_loss") for rate in rates}
        )
        low, *_, high = ordered = sorted(rates)
        if best not in (low, high):
            break
        beyond = low * low / ordered[1] if best == low else high * high / ordered[-2]
        rates.append(float(f"{beyond:.2g}"))
    return rates


def choose_learning_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate with the lowest validation loss, None where every run failed."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: known[rate]) if known else None
