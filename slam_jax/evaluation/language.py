"""How well a language model predicts texts: loss, bits per byte, perplexity, exact answers."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from slam_jax.data.packing import TextBatch
from slam_jax.evaluation.metrics import Interval
from slam_jax.runtime.distributed import to_host
from slam_jax.training.losses import token_losses_in_chunks

_CHUNK = 2_048  # tokens whose logits are in memory at a time
_LARGEST = 700.0  # exp of more overflows


class TextScores(NamedTuple):
    """For each text: the number of tokens that count, their bytes, their negative log-probability
    in nats, and how many of them are the most probable token."""

    tokens: Int[np.ndarray, "N"]
    bytes: Int[np.ndarray, "N"]
    nats: Float[np.ndarray, "N"]
    right: Int[np.ndarray, "N"]

    @property
    def exact(self) -> Bool[np.ndarray, "N"]:
        """Whether greedy decoding writes exactly this answer."""
        return self.right == self.tokens


def score_texts(
    graphdef: nnx.GraphDef,
    params: Any,
    batches: Iterable[tuple[TextBatch, Int[np.ndarray, "B T_1"]]],
    token_bytes: list[bytes],
) -> TextScores:
    """One forward pass over each batch of `scoring_batches`.

    graphdef, params: of `nnx.split`. token_bytes: of the tokenizer. Texts of which only a part is
    in the batches are scored on this part.
    """
    sizes = np.array([len(each) for each in token_bytes])
    totals: dict[int, np.ndarray] = {}
    for batch, owners in batches:
        nats, right = map(np.asarray, to_host(_score(graphdef, params, batch)))
        counted = np.asarray(batch.counted)[:, 1:]
        targets = np.asarray(batch.tokens)[:, 1:][counted]
        owned = owners[:, 1:][counted]
        each = np.stack([np.ones(len(targets)), sizes[targets], nats[counted], right[counted]])
        for owner in np.unique(owned):
            total = totals.setdefault(int(owner), np.zeros(4))
            total += each[:, owned == owner].sum(axis=1)
    found = np.array([totals[owner] for owner in sorted(totals)]).reshape(-1, 4).T
    tokens, num_bytes, nats, right = found
    return TextScores(tokens.astype(int), num_bytes.astype(int), nats, right.astype(int))


def summarise_texts(scores: TextScores, *, answers: bool) -> dict[str, float]:
    """loss: nats per token. perplexity: its exponential. bits_per_byte. accuracy: the share of
    tokens that are the most probable one; with `answers` of answers that greedy decoding writes
    exactly, which is `exact_match`, too."""
    tokens = max(int(scores.tokens.sum()), 1)
    loss = float(scores.nats.sum() / tokens)
    found = {
        "accuracy": float(scores.right.sum() / tokens),
        "loss": loss,
        "bits_per_byte": float(scores.nats.sum() / math.log(2) / max(scores.bytes.sum(), 1)),
        "perplexity": math.exp(min(loss, _LARGEST)),
    }
    if answers:
        found["token_accuracy"] = found["accuracy"]
        found["accuracy"] = found["exact_match"] = float(scores.exact.mean())
    return found


def text_intervals(
    scores: TextScores, *, answers: bool, seed: int = 0, resamples: int = 1_000
) -> dict[str, Interval]:
    """The figures of `summarise_texts` with 95% bootstrap intervals; texts are resampled."""
    count, rng = len(scores.tokens), np.random.default_rng(seed)
    draws = [
        summarise_texts(TextScores(*(x[chosen] for x in scores)), answers=answers)
        for chosen in (rng.integers(0, count, count) for _ in range(resamples))
    ]
    means = summarise_texts(scores, answers=answers)
    return {
        name: Interval(mean, *map(float, np.quantile([d[name] for d in draws], (0.025, 0.975))))
        for name, mean in means.items()
    }


@partial(jax.jit, static_argnames="graphdef")
def _score(graphdef: nnx.GraphDef, params: Any, batch: TextBatch) -> Any:
    """The nats of each token after the first, and whether it is the most probable one."""
    model = nnx.merge(graphdef, params)
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segments)[:, :-1]
    given = dict(segment_ids=segments) if batch.packed else dict(mask=segments > 0)
    hidden = model.hidden(tokens[:, :-1], **given)
    losses = token_losses_in_chunks(model.logits, hidden.states, tokens[:, 1:], _CHUNK)
    return losses.cross_entropy, losses.correct
