"""The losses that training minimises."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray
from slam_jax.batch import Batch
from slam_jax.errors import require, require_count
from slam_jax.layers.constrain import constrain
from slam_jax.protocol import LanguageModel
from slam_jax.slam_v3 import Inputs, SlamV3


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The weights of the terms that are added to the cross-entropy of the answers.

    z_loss: of the squared log-normaliser of the logits. alignment: of the sigmoid loss between
    text and image of a scene, on batches that show both in full.
    chunk_tokens: number of tokens whose logits are computed at a time, and recomputed for the
    gradient, which saves memory where the vocabulary is large. None = all at once, which is faster.
    """

    z_loss: float = 0.0
    alignment: float = 0.0
    chunk_tokens: int | None = None

    def __post_init__(self):
        for field in ("z_loss", "alignment"):
            value = getattr(self, field)
            require(value >= 0, f"loss.{field}", value, "0 (off) or more")
        if self.chunk_tokens is not None:
            require_count("loss.chunk_tokens", self.chunk_tokens)


class LossParts(NamedTuple):
    """The minimised total, its terms without their weights, and the share of correct tokens."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    alignment: Float[Array, ""]
    accuracy: Float[Array, ""]


def num_answer_tokens(batch: Batch) -> Int[Array, ""]:
    """The number of tokens that the mean of `slam_v3_loss` is over."""
    return batch.answer_mask.sum()


class TokenLosses(NamedTuple):
    """The losses of each token, or their means.

    cross_entropy: in nats. z: the squared log-normaliser of the logits. correct: 1 where the most
    probable token is the target, else 0.
    """

    cross_entropy: Float[Array, "*B"]
    z: Float[Array, "*B"]
    correct: Float[Array, "*B"]


def token_losses(logits: Float[Array, "*B V"], targets: Int[AnyArray, "*B"]) -> TokenLosses:
    return TokenLosses(
        cross_entropy=optax.softmax_cross_entropy_with_integer_labels(logits, targets),
        z=jax.nn.logsumexp(logits, axis=-1) ** 2,
        correct=jnp.float32(logits.argmax(-1) == targets),
    )


def token_losses_in_chunks(
    head: Callable[[Float[Array, "chunk D"]], Float[Array, "chunk V"]],
    hidden: Float[Array, "*B D"],
    targets: Int[AnyArray, "*B"],
    chunk_tokens: int,
) -> TokenLosses:
    """`token_losses(head(hidden), targets)`, with the logits of `chunk_tokens` tokens at a time.

    A gradient recomputes the logits of each chunk, so never more than one chunk is in memory.
    """
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), jnp.asarray(targets).reshape(-1)
    count = -(-len(flat) // chunk_tokens)
    pads = count * chunk_tokens - len(flat)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, pads)] + [(0, 0)] * (x.ndim - 1))
        # Each device takes a share of every chunk; neighbouring tokens may be on one device.
        return constrain(x.reshape(count, chunk_tokens, *x.shape[1:]), (None, "batch"))

    @jax.checkpoint
    def chunk_losses(h: jax.Array, t: jax.Array) -> TokenLosses:
        return token_losses(head(h), t)

    chunks = (split(flat), split(flat_targets))
    _, losses = jax.lax.scan(lambda _, chunk: (None, chunk_losses(*chunk)), None, chunks)
    return TokenLosses(*(x.reshape(-1)[: len(flat)].reshape(targets.shape) for x in losses))


def _mean_losses(
    model: Any,
    targets: Int[AnyArray, "*B"],
    mask: Bool[AnyArray, "*B"],
    chunk_tokens: int | None,
    *inputs: Any,
    **more: Any,
) -> tuple[TokenLosses, Float[Array, ""] | float]:
    """The mean losses of the tokens in `mask` that `model(*inputs, **more)` predicts, and its
    auxiliary loss."""
    if chunk_tokens is None:
        output = model(*inputs, **more)
        losses = token_losses(output.logits, targets)
    else:
        output = model.hidden(*inputs, **more)
        losses = token_losses_in_chunks(model.logits, output.states, targets, chunk_tokens)
    count = jnp.maximum(mask.sum(), 1)
    means = (jnp.where(mask, x, 0.0).sum() / count for x in losses)
    return TokenLosses(*means), output.aux_loss


def slam_v3_loss(
    model: SlamV3, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None
) -> LossParts:
    """The mean cross-entropy over answer tokens, and the terms that the config adds.

    For the alignment loss text and image are encoded once more, each alone.
    """
    chex.assert_equal_shape([batch.prompt_length, batch.length])
    chex.assert_equal_shape_prefix([batch.tokens, batch.length], 2)
    tokens, targets, inputs = batch.tokens[..., :-1], batch.tokens[..., 1:], batch.inputs
    mask, chunk = batch.answer_mask, config.chunk_tokens
    losses, _ = _mean_losses(model, targets, mask, chunk, tokens, inputs, key=key)
    alignment = jnp.zeros(())
    if config.alignment and batch.paired:
        text = model.embed(Inputs(text=inputs.text, text_mask=inputs.text_mask), key=key)
        image = model.embed(Inputs(image=inputs.image, image_mask=inputs.image_mask), key=key)
        alignment = model.alignment.loss(text, image)
    return LossParts(
        total=losses.cross_entropy + config.z_loss * losses.z + config.alignment * alignment,
        cross_entropy=losses.cross_entropy,
        z_loss=losses.z,
        alignment=alignment,
        accuracy=losses.correct,
    )


class LanguageLossParts(NamedTuple):
    """The minimised total, its terms, and the share of correct tokens."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    aux_loss: Float[Array, ""]
    accuracy: Float[Array, ""]


def language_model_loss(
    model: LanguageModel,
    tokens: Int[AnyArray, "*B T_1"],
    mask: Bool[AnyArray, "*B T_1"] | None = None,
    *,
    segment_ids: Int[AnyArray, "*B T_1"] | None = None,
    counted: Bool[AnyArray, "*B T_1"] | None = None,
    key: PRNGKeyArray | None = None,
    chunk_tokens: int | None = None,
) -> LanguageLossParts:
    """The mean cross-entropy of each token given those before it, and the model's auxiliary loss.

    mask: True = a real token, None = all are; of the shape of `tokens`. segment_ids: of rows of
    several texts, see `slam_jax.language_models.base.HeadedModel`; no token is predicted from
    another text. counted: the tokens whose prediction counts, such as those of an answer; None =
    all. chunk_tokens: see `LossConfig`; the model must then be a
    `slam_jax.protocol.Headed`.
    """
    more: dict[str, Any] = {"key": key}
    if mask is not None:
        chex.assert_equal_shape([tokens, mask])  # any other mask could broadcast
    targets = tokens[..., 1:]
    inputs = (tokens[..., :-1], None if mask is None else mask[..., :-1])
    both = jnp.ones(targets.shape, bool) if mask is None else mask[..., :-1] & mask[..., 1:]
    if segment_ids is not None:
        chex.assert_equal_shape([tokens, segment_ids])
        before, after = segment_ids[..., :-1], segment_ids[..., 1:]
        both, more["segment_ids"] = (before == after) & (before > 0), before
    if counted is not None:
        chex.assert_equal_shape([tokens, counted])
        both &= counted[..., 1:]
    losses, aux_loss = _mean_losses(model, targets, both, chunk_tokens, *inputs, **more)
    aux_loss = jnp.asarray(aux_loss, losses.cross_entropy.dtype)
    total = losses.cross_entropy + aux_loss
    return LanguageLossParts(total, losses.cross_entropy, aux_loss, losses.correct)
