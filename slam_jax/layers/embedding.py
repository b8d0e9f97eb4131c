"""The table of embeddings of tokens."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slam_jax.array_typing import AnyArray
from slam_jax.kernels.row_product import quantized_table_product
from slam_jax.layers.linear import project_to_float32
from slam_jax.layers.quantized_array import dequantize, is_quantized


class Embedding(nnx.Embed):
    """`nnx.Embed`, which may also be the head of a model.

    `slam_jax.quantize` makes the table int8 with a `scale` for each token, or uint16, the bits of
    bfloat16; see `slam_jax.layers.quantized_array`. A lookup dequantises the rows that it needs.
    """

    scale: nnx.Param | None = None  # so that other tables have no further attribute

    def __call__(self, inputs: Int[AnyArray, "*B"], out_sharding=None) -> Float[Array, "*B D"]:
        if not is_quantized(self.embedding):
            return super().__call__(jnp.asarray(inputs), out_sharding)
        rows = jnp.take(self.embedding[...], inputs, axis=0)
        scale = None if self.scale is None else jnp.take(self.scale[...], inputs, axis=0)
        return dequantize(rows, scale, (-1,)).astype(self.dtype)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """x times the transposed table, in float32 or wider; see `project_to_float32`."""
        table = self.embedding[...]
        if not is_quantized(table):
            return project_to_float32(x, table.T)
        y = quantized_table_product(x, table)
        if self.scale is None:
            return y
        return y * jax.lax.broadcast_to_rank(self.scale[...].astype(y.dtype), y.ndim)
