"""The feed-forward networks, gated and plain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slam_jax.layers.linear import LECUN_NORMAL, Initializer, Linear


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)); SwiGLU with the default activation.

    use_bias: of all three maps. out_scale: scale of the initial `down`; below 1 where many layers
    add to one residual stream.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        use_bias: bool = False,
        out_scale: float = 1.0,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes: Any = dict(dtype=dtype, param_dtype=param_dtype)
        kw: Any = dict(use_bias=use_bias, kernel_init=kernel_init, **dtypes, rngs=rngs)
        self.activation = activation
        self.gate = Linear(embed_dim, mlp_dim, **kw)
        self.up = Linear(embed_dim, mlp_dim, **kw)
        self.down = Linear(mlp_dim, embed_dim, init_scale=out_scale, **kw)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class MLP(nnx.Module):
    """down(activation(up(x))). use_bias: of both maps.

    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
        use_bias: bool = False,
        kernel_init: Initializer = LECUN_NORMAL,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes: Any = dict(dtype=dtype, param_dtype=param_dtype)
        kw: Any = dict(use_bias=use_bias, kernel_init=kernel_init, **dtypes, rngs=rngs)
        self.activation = activation
        self.up = Linear(embed_dim, mlp_dim, **kw)
        self.down = Linear(mlp_dim, embed_dim, **kw)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(self.activation(self.up(x)))
