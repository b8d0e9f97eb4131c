"""What training minimises."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray
from slam_jax.data import Batch
from slam_jax.errors import require
from slam_jax.protocol import LanguageModel
from slam_jax.slam_v3 import Inputs, SlamV3


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of what is added to the cross-entropy of the answers.

    z_loss: of the squared log-normaliser of the logits. alignment: of the sigmoid loss between
    text and image of a scene, on batches that show both in full.
    """

    z_loss: float = 0.0
    alignment: float = 0.0

    def __post_init__(self):
        for field in ("z_loss", "alignment"):
            value = getattr(self, field)
            require(value >= 0, f"loss.{field}", value, "0 (off) or more")


class LossParts(NamedTuple):
    """Scalars: the sum that is minimised, its parts unweighted, and the share of right tokens."""

    total: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    alignment: Float[Array, ""]
    accuracy: Float[Array, ""]


def answer_mask(batch: Batch) -> Bool[Array, "B Q _"]:
    """True at positions t whose next token belongs to the answer or is the <eos> after it."""
    t = jnp.arange(batch.tokens.shape[-1] - 1)
    first, end = batch.prompt_length[..., None] - 1, batch.length[..., None] - 1
    return (t >= first) & (t < end)


def token_losses(
    logits: Float[Array, "*B V"], targets: Int[AnyArray, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Cross-entropy in nats and squared log-normaliser of each token."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets), normaliser**2


def slam_v3_loss(
    model: SlamV3, batch: Batch, config: LossConfig, *, key: PRNGKeyArray | None = None
) -> LossParts:
    """Mean cross-entropy over answer tokens, and what the config adds.

    The alignment loss takes two more encodes, of the text alone and of the image alone: fused
    tokens would have seen each other.
    """
    logits = model(batch.tokens[..., :-1], batch.inputs, key=key).logits
    targets, mask = batch.tokens[..., 1:], answer_mask(batch)
    cross_entropy, z = token_losses(logits, targets)
    count = jnp.maximum(mask.sum(), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x, 0.0).sum() / count

    cross_entropy, z = mean(cross_entropy), mean(z)
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
        accuracy=mean(jnp.float32(logits.argmax(-1) == targets)),
    )


class LanguageLossParts(NamedTuple):
    """Scalars: the sum that is minimised, its parts, and the share of right tokens."""

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
) -> LanguageLossParts:
    """Mean cross-entropy of each token after the first given those before it, and what the model
    adds. mask: True = a real token, None = all are."""
    output = model(tokens[..., :-1], None if mask is None else mask[..., :-1], key=key)
    targets = tokens[..., 1:]
    cross_entropy, _ = token_losses(output.logits, targets)
    right = jnp.float32(output.logits.argmax(-1) == targets)
    both = True if mask is None else mask[..., :-1] & mask[..., 1:]
    real = jnp.broadcast_to(jnp.float32(both), targets.shape)
    count = jnp.maximum(real.sum(), 1.0)
    cross_entropy = jnp.sum(cross_entropy * real) / count
    aux_loss = jnp.asarray(output.aux_loss, cross_entropy.dtype)
    return LanguageLossParts(
        total=cross_entropy + aux_loss,
        cross_entropy=cross_entropy,
        aux_loss=aux_loss,
        accuracy=jnp.sum(right * real) / count,
    )
