"""A batch of SLAM v3: what data sets give, and training takes.

It is apart from both, so that a training step can be built without the libraries of data sets.
"""

from flax import struct
from jaxtyping import Bool, Int

from slam_jax.array_typing import AnyArray
from slam_jax.layers.masks import prefix_mask
from slam_jax.slam_v3.streams import Inputs


@struct.dataclass
class Batch:
    """A batch of one view; inputs that the view does not show are None.

    tokens: <bos> prompt answer <eos>, right-padded. prompt_length: tokens of <bos> and the prompt.
    length: all tokens but the pads. Positions prompt_length - 1 to length - 2 predict the answer
    and <eos>. paired: whether text and image show the same content, as retrieval needs it; static,
    not a leaf of the pytree.
    """

    inputs: Inputs
    tokens: Int[AnyArray, "B Q T"]
    prompt_length: Int[AnyArray, "B Q"]
    length: Int[AnyArray, "B Q"]
    paired: bool = struct.field(pytree_node=False, default=False)

    @property
    def answer_mask(self) -> Bool[AnyArray, "B Q _"]:
        """True at positions t whose next token belongs to the answer or is the <eos> after it."""
        size = self.tokens.shape[-1] - 1
        return prefix_mask(self.length - 1, size) & ~prefix_mask(self.prompt_length - 1, size)
