"""How probable a model finds the expected answers, without generating any."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from slam_jax.data import EvaluationBatch


class Likelihood(NamedTuple):
    """By example and question.

    nats: negative log-probability of the expected answer, with its <eos>. right: whether greedy
    decoding writes exactly this answer. confidence: the product of the probabilities of the most
    probable tokens, along the expected answer.
    """

    nats: Float[np.ndarray, "N Q"]
    right: Bool[np.ndarray, "N Q"]
    confidence: Float[np.ndarray, "N Q"]


def answer_likelihood(
    graphdef: nnx.GraphDef, params: Any, batches: Iterable[EvaluationBatch]
) -> Likelihood:
    """One forward pass over each batch; arguments as in `evaluate`."""
    found = []
    for batch, _, valid in batches:
        figures = jax.device_get(_score(graphdef, params, batch))
        found.append([np.asarray(x)[:valid] for x in figures])
    return Likelihood(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@partial(jax.jit, static_argnames="graphdef")
def _score(graphdef: nnx.GraphDef, params: Any, batch: Any) -> Any:
    model = nnx.merge(graphdef, nnx.State(params))
    tokens, targets = batch.tokens[..., :-1], batch.tokens[..., 1:]
    logs = jax.nn.log_softmax(model(tokens, batch.inputs).logits)
    expected = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    mask = batch.answer_mask
    nats = -jnp.where(mask, expected, 0.0).sum(axis=-1)
    right = jnp.all((logs.argmax(axis=-1) == targets) | ~mask, axis=-1)
    confidence = jnp.exp(jnp.where(mask, logs.max(axis=-1), 0.0).sum(axis=-1))
    return nats, right, confidence
