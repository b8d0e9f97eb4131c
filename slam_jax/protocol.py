"""What training, generation and evaluation know of a model, whatever it is made of."""

from typing import Any, Protocol, runtime_checkable

from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray


@struct.dataclass
class Output:
    """What a full forward pass returns.

    logits: of the next token, at every position. aux_loss: what training adds to the cross-entropy
    for this call, in nats and already weighted, such as the load balance of experts. attention:
    the attention weights, where a model was asked for them.
    """

    logits: Float[Array, "*B T V"]
    aux_loss: Float[Array, ""] | float = 0.0
    attention: Any = None


@struct.dataclass
class Hidden:
    """The same before the head: `model.logits(states)` are the logits."""

    states: Float[Array, "*B T D"]
    aux_loss: Float[Array, ""] | float = 0.0
    attention: Any = None


@runtime_checkable
class Decodable(Protocol):
    """A model that continues token sequences with a cache passed in and out.

    `memory` is what an encoder made of the other inputs; a pure language model is given None.
    prefill reads right-padded prompts into an empty cache and returns the logits of every position,
    decode_step reads one token a row. Both agree with the full forward pass.
    """

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Any: ...

    def prefill(
        self,
        tokens: Int[AnyArray, "*B T"],
        cache: Any,
        memory: Any,
        *,
        lengths: Int[AnyArray, "*B"] | None = None,
    ) -> tuple[Float[Array, "*B T V"], Any]: ...

    def decode_step(
        self, tokens: Int[AnyArray, "*B"], cache: Any, memory: Any
    ) -> tuple[Float[Array, "*B V"], Any]: ...


@runtime_checkable
class LanguageModel(Decodable, Protocol):
    """A model of token sequences alone.

    mask: True = a real token, None = all are; pads change nothing for the others.
    key: given in training, for dropout and whatever else happens only there.
    """

    def __call__(
        self,
        tokens: Int[AnyArray, "*B T"],
        mask: Bool[AnyArray, "*B T"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Output: ...


@runtime_checkable
class Headed(Protocol):
    """A model whose full forward pass can be had in two parts, so that a loss may ask for the
    logits of a few tokens at a time.

    hidden: takes what the forward pass takes. logits: float32 or wider, of any number of tokens.
    """

    def hidden(self, tokens: Int[AnyArray, "*B T"], *inputs: Any, key: Any = None) -> Hidden: ...

    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]: ...
