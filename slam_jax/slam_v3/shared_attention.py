"""The shared attention: all encoder processes read one bank of keys and values."""

from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Float

from slam_jax.layers import attention
from slam_jax.layers.linear import Linear
from slam_jax.layers.norms import RMSNorm
from slam_jax.slam_v3.config import SlamV3Config


class Bank(NamedTuple):
    """Keys and values of the tokens of all streams.

    `JointBlock` computes them once per encode; every layer of every encoder process reads them.
    N and H are `config.shared_heads`.
    """

    k: Float[Array, "B S N H"]
    v: Float[Array, "B S N H"]
    mask: Bool[Array, "B 1 S"] | None


class SharedAttention(nnx.Module):
    """Multi-head attention of one process to the bank: its own queries and its own output map.

    A learned bias of the queries lets each process ask the bank something else. Neither queries nor
    keys are rotated: word order enters the bank through the joint block.

    `config.shared_num_heads` sets the number of heads N, here and in the bank.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, heads = config.embed_dim, config.shared_heads
        self.query = Linear(dim, heads, **kw)
        norm: Any = dict(param_dtype=kw["param_dtype"])
        self.q_norm = RMSNorm(heads[1], **norm) if config.qk_norm else None
        normal = nnx.initializers.normal(0.02)
        self.query_bias = nnx.Param(normal(rngs.params(), heads, kw["param_dtype"]))
        self.out = Linear(heads, dim, init_scale=config.encoder_out_scale, **kw)

    def read(
        self, x: Float[Array, "B T D"], bank: Bank, *, with_weights: bool = False
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T S"] | None]:
        """What each token of x reads from the bank, and the weights if asked for, else None."""
        q = self.query(x) if self.q_norm is None else self.q_norm(self.query(x))
        q = q + self.query_bias[...].astype(q.dtype)[None, None]
        y = self.out(attention.attend(q, bank.k, bank.v, bank.mask))
        if not with_weights:
            return y, None
        return y, attention.attention_weights(q, bank.k, bank.mask)
