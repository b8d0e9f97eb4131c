"""The pre-norm transformer block, of the "vit" and of the joint block."""

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slam_jax.layers.attention import SelfAttention
from slam_jax.layers.dropout import DropoutKey, dropout, split
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.slam_v3.config import SlamV3Config


class TransformerBlock(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, param_dtype, scale = config.embed_dim, kw["param_dtype"], config.encoder_out_scale
        heads = (config.num_heads, config.head_dim)
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(dim, param_dtype=param_dtype)
        self.attention = SelfAttention(dim, *heads, qk_norm=config.qk_norm, out_scale=scale, **kw)
        self.mlp_norm = RMSNorm(dim, param_dtype=param_dtype)
        self.mlp = GatedMLP(dim, config.mlp_dim, out_scale=scale, **kw)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B #S S"] | None = None,
        positions: Int[Array, "P"] | None = None,
        *,
        key: DropoutKey = None,
    ) -> Float[Array, "B S D"]:
        key_attention, key_mlp = split(key, 2)
        h = self.attention(self.attention_norm(x), mask, positions)
        x = x + dropout(h, self.dropout, key_attention)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, key_mlp)
