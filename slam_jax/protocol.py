"""What training, generation and evaluation know of a model, whatever it is made of."""

from typing import Any, Protocol, runtime_checkable

from flax import struct
from jaxtyping import Array, Float, Int

from slam_jax.array_typing import AnyArray


@struct.dataclass
class Output:
    """What a full forward pass returns: next-token logits at every position."""

    logits: Float[Array, "*B T V"]


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
