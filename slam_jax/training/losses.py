"""The losses that training minimises."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray
from slam_jax.data import Batch
from slam_jax.errors import require, require_count
from slam_jax.layers.masks import prefix_mask
from slam_jax.protocol import LanguageModel
from slam_jax.slam_v3 import Inputs, SlamV3
from slam_jax.training.token_losses import TokenLosses, token_losses, token_losses_in_chunks


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


def answer_mask(batch: Batch) -> Bool[Array, "B Q _"]:
    """True at positions t whose next token belongs to the answer or is the <eos> after it."""
    size = batch.tokens.shape[-1] - 1
    return prefix_mask(batch.length - 1, size) & ~prefix_mask(batch.prompt_length - 1, size)


def num_answer_tokens(batch: Batch) -> Int[Array, ""]:
    """The number of tokens that the mean of `slam_v3_loss` is over."""
    return answer_mask(batch).sum()


def _token_losses(
    model: Any, targets: Int[AnyArray, "*B"], chunk_tokens: int | None, *inputs: Any, key: Any
) -> tuple[TokenLosses, Float[Array, ""] | float]:
    """The losses of the tokens that `model(*inputs)` predicts, and the auxiliary loss."""
    if chunk_tokens is None:
        output = model(*inputs, key=key)
        return token_losses(output.logits, targets), output.aux_loss
    hidden = model.hidden(*inputs, key=key)
    losses = token_losses_in_chunks(model.logits, hidden.states, targets, chunk_tokens)
    return losses, hidden.aux_loss


def slam_v3_loss(
    model: SlamV3, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None
) -> LossParts:
    """The mean cross-entropy over answer tokens, and the terms that the config adds.

    The alignment loss encodes text and image once more, each alone, because fused tokens have seen
    both.
    """
    chex.assert_equal_shape([batch.prompt_length, batch.length])
    chex.assert_equal_shape_prefix([batch.tokens, batch.length], 2)
    inputs, targets = (batch.tokens[..., :-1], batch.inputs), batch.tokens[..., 1:]
    losses, _ = _token_losses(model, targets, config.chunk_tokens, *inputs, key=key)
    mask = answer_mask(batch)
    count = jnp.maximum(num_answer_tokens(batch), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x, 0.0).sum() / count

    cross_entropy, z = mean(losses.cross_entropy), mean(losses.z)
    alignment = jnp.zeros(())
    if config.alignment and batch.paired:
        inputs = batch.inputs
        text = model.embed(Inputs(text=inputs.text, text_mask=inputs.text_mask), key=key)
        image = model.embed(Inputs(image=inputs.image, image_mask=inputs.image_mask), key=key)
        alignment = model.alignment.loss(text, image)
    return LossParts(
        total=cross_entropy + config.z_loss * z + config.alignment * alignment,
        cross_entropy=cross_entropy,
        z_loss=z,
        alignment=alignment,
        accuracy=mean(losses.correct),
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
    key: PRNGKeyArray | None = None,
    chunk_tokens: int | None = None,
) -> LanguageLossParts:
    """The mean cross-entropy of each token given those before it, and the model's auxiliary loss.

    mask: True = a real token, None = all are; of the shape of `tokens`. chunk_tokens: see
    `LossConfig`; the model must then be a `slam_jax.protocol.Headed`.
    """
    if mask is not None:
        chex.assert_equal_shape([tokens, mask])  # any other mask could broadcast
    targets = tokens[..., 1:]
    inputs = (tokens[..., :-1], None if mask is None else mask[..., :-1])
    losses, aux_loss = _token_losses(model, targets, chunk_tokens, *inputs, key=key)
    both = True if mask is None else mask[..., :-1] & mask[..., 1:]
    real = jnp.broadcast_to(jnp.float32(both), targets.shape)
    count = jnp.maximum(real.sum(), 1.0)
    cross_entropy = jnp.sum(losses.cross_entropy * real) / count
    aux_loss = jnp.asarray(aux_loss, cross_entropy.dtype)
    return LanguageLossParts(
        total=cross_entropy + aux_loss,
        cross_entropy=cross_entropy,
        aux_loss=aux_loss,
        accuracy=jnp.sum(losses.correct * real) / count,
    )
