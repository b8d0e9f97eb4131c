"""Retrieval: embeddings of inputs, and the loss that brings those of one scene together."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slam_jax.layers.linear import Linear, project_to_float32
from slam_jax.layers.precision import upcast
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.decoder import Memory


class AlignmentHead(nnx.Module):
    """From the mean of a memory's latents to a unit vector, for retrieval and the alignment loss.

    The memory must be that of one input alone: fused tokens have already seen each other.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        self.project = Linear(config.memory_dim, config.alignment_dim, **kw)
        # The initial values of Zhai et al. 2023, section 3.2: nearly all pairs are negative.
        self.log_temperature = nnx.Param(jnp.log(jnp.full((), 10.0, kw["param_dtype"])))
        self.bias = nnx.Param(jnp.full((), -10.0, kw["param_dtype"]))

    def __call__(self, memory: Memory) -> Float[Array, "B embed"]:
        c_mem = memory.c_mem
        mask = jnp.ones(c_mem.shape[:2], bool) if memory.mask is None else memory.mask
        present = mask[..., None].astype(upcast(c_mem.dtype))
        mean = jnp.sum(c_mem * present, axis=1) / jnp.maximum(jnp.sum(present, axis=1), 1.0)
        e = project_to_float32(mean.astype(c_mem.dtype), self.project.weight)
        # Cut before the root, which has no gradient at 0: a row that shows nothing.
        return e / jnp.sqrt(jnp.maximum(jnp.sum(e * e, axis=-1, keepdims=True), 1e-12))

    def loss(self, a: Float[Array, "B embed"], b: Float[Array, "B embed"]) -> Float[Array, ""]:
        """Sigmoid loss of all B x B pairs, of which the diagonal belongs together.

        Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2.
        """
        logits = a @ b.T * jnp.exp(self.log_temperature[...]) + self.bias[...]
        signs = 2.0 * jnp.eye(a.shape[0]) - 1.0
        return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / a.shape[0]
