"""The measurements of `python -m slam_jax.evaluation.weights`."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slam_jax.errors import InputError
from slam_jax.layers.quantization import WEIGHTS, quantize
from slam_jax.reporting.checkpoint import open_checkpoint

_LARGEST = 700.0  # exp of more overflows


class Batch(NamedTuple):
    """Arguments of a forward pass. targets: the token after each position. counted: positions whose
    logits are compared."""

    arguments: tuple[Any, ...]
    targets: Any
    counted: Any


class Change(NamedTuple):
    """The change that weights make, against float32.

    most, rms: error of the logits, over the standard deviation of the logits. nats: a token.
    exact: the share of rows whose tokens are all the most probable ones.
    """

    weights: str
    most: float
    rms: float
    nats: float
    exact: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, _LARGEST))


def measure_weights(model: Any, batches: Iterable[Batch]) -> list[Change]:
    """The changes of bfloat16 and int8, after a first row of float32, which is compared with
    itself. model: as `slam_jax.quantize` takes it."""

    @jax.jit
    def score(model: Any, batch: Batch, plain: Any) -> Any:
        """The logits, and the sums over the counted positions."""
        logits, counted = model(*batch.arguments).logits, batch.counted
        difference = jnp.abs(logits - (logits if plain is None else plain))
        difference = jnp.where(counted[..., None], difference, 0.0)
        values = jnp.where(counted[..., None], logits, 0.0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)
        nats = -jnp.where(counted, chosen[..., 0], 0.0).sum()
        right = jnp.all((logits.argmax(-1) == batch.targets) | ~counted, axis=-1)
        asked = counted.any(axis=-1)
        sums = jnp.stack(
            [
                counted.sum() * logits.shape[-1],
                values.sum(),
                (values**2).sum(),
                (difference**2).sum(),
                counted.sum(),
                nats,
                (right & asked).sum(),
                asked.sum(),
            ]
        )
        return logits, sums, difference.max()

    models = [quantize(model, weights) for weights in WEIGHTS]
    sums, most = np.zeros((len(models), 8)), np.zeros(len(models))
    for batch in batches:
        plain = None
        for i, each in enumerate(models):
            logits, found, largest = score(each, batch, plain)
            plain = logits if plain is None else plain
            sums[i] += np.asarray(found, np.float64)
            most[i] = max(most[i], float(largest))
    if not sums[0, 4]:
        raise InputError("there is nothing to compare; give a longer text or more examples")
    numbers, total, squares = sums[0, :3]
    deviation = math.sqrt(max(squares / numbers - (total / numbers) ** 2, 1e-30))
    return [
        Change(
            weights,
            most[i] / deviation,
            math.sqrt(sums[i, 3] / numbers) / deviation,
            sums[i, 5] / sums[i, 4],
            sums[i, 6] / sums[i, 7],
        )
        for i, weights in enumerate(WEIGHTS)
    ]


def text_batches(loaded: Any, text: str, window: int) -> Iterator[Batch]:
    """Windows of a text, each after the end token or the last token of the window before."""
    tokenizer = loaded.tokenizer
    first = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    tokens = np.array([*first, *tokenizer.encode(text)], np.int32)
    window = min(window, loaded.model.config.context_length)
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window + 1]
        counted = np.arange(window) < len(part) - 1
        part = np.pad(part, (0, window + 1 - len(part)))
        yield Batch((part[None, :-1],), part[None, 1:], counted[None])


def question_batches(workdir: str, examples: int) -> tuple[Any, Iterator[Batch]]:
    """A SLAM v3, and the first test examples of the views of its run; tokens of answers count."""
    opened = open_checkpoint(workdir)

    def batches() -> Iterator[Batch]:
        for view in opened.views:
            left = examples
            for batch, _, valid in opened.batches(view):
                if left <= 0:
                    break
                counted = np.array(batch.answer_mask)
                counted[min(valid, left) :] = False
                left -= valid
                yield Batch((batch.tokens[..., :-1], batch.inputs), batch.tokens[..., 1:], counted)

    return opened.loaded.model, batches()


def print_changes(changes: list[Change], *, perplexity: bool) -> None:
    """A table; the last column is the change of perplexity in percent, or of accuracy in points."""
    figure = "perplexity" if perplexity else "accuracy"
    print(f"{'weights':10}{'largest error':>15}{'RMS error':>12}{figure:>13}{'change':>12}")
    for each in changes:
        if perplexity:
            shown = f"{each.perplexity:13.4f}"
            change = f"{100 * (each.perplexity / changes[0].perplexity - 1):+11.3f}%"
        else:
            shown = f"{100 * each.exact:12.2f}%"
            change = f"{100 * (each.exact - changes[0].exact):+12.2f}"
        print(f"{each.weights:10}{each.most:15.5f}{each.rms:12.6f}{shown}{change}")
