"""The interface of models that training, generation and evaluation use."""

from typing import Any, Protocol, runtime_checkable

from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.array_typing import AnyArray


@struct.dataclass
class Output:
    """The result of a full forward pass.

    logits: the logits of the next token at every position. aux_loss: a loss that training adds to
    the cross-entropy, in nats and already weighted, such as the load-balancing loss of experts.
    attention: the attention weights, if the caller asked for them.
    """

    logits: Float[Array, "*B T V"]
    aux_loss: Float[Array, ""] | float = 0.0
    attention: Any = None


@struct.dataclass
class Hidden:
    """As `Output`, with the states before the head: `model.logits(states)` gives the logits."""

    states: Float[Array, "*B T D"]
    aux_loss: Float[Array, ""] | float = 0.0
    attention: Any = None


@runtime_checkable
class Decodable(Protocol):
    """A model that continues token sequences with a cache passed in and out.

    `memory` is the output of an encoder for the other inputs; for a pure language model it is None.
    `prefill` reads right-padded prompts into an empty cache and returns the logits of every
    position; `lengths` are the tokens of each prompt, None = all T. With `append`, which is a
    Python bool, the cache may store tokens, a different number in each row: the new tokens follow
    them, and logits and cache are those of one prefill of both together. A row may then also get 0
    tokens. `decode_step` reads one token a row. All agree with the full forward pass.

    Where a row has no room, InputError is raised before anything is computed. Under `jax.jit`
    neither lengths nor room can be checked: `prefill` without `append` needs an empty cache, and a
    token without room is not stored, but counted.
    """

    def init_cache(self, batch_shape: tuple[int, ...], max_length: int) -> Any: ...

    def prefill(
        self,
        tokens: Int[AnyArray, "*B T"],
        cache: Any,
        memory: Any,
        *,
        lengths: Int[AnyArray, "*B"] | None = None,
        append: bool = False,
    ) -> tuple[Float[Array, "*B T V"], Any]: ...

    def decode_step(
        self, tokens: Int[AnyArray, "*B"], cache: Any, memory: Any
    ) -> tuple[Float[Array, "*B V"], Any]: ...


@runtime_checkable
class LanguageModel(Decodable, Protocol):
    """A model of token sequences alone.

    mask: True = a real token, None = all are real. Pads do not change the logits of real tokens.
    key: passed in training only, for dropout and other random choices.
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
    """A model that computes its forward pass in two parts.

    A loss can then compute the logits of a few tokens at a time. `hidden` takes the arguments of
    the forward pass. `logits` takes any number of tokens and returns float32 or wider.
    """

    def hidden(self, tokens: Int[AnyArray, "*B T"], *inputs: Any, key: Any = None) -> Hidden: ...

    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]: ...
