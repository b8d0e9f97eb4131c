"""The fusion node, which turns the outputs of the four processes into one memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import einops
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from slam_jax.layers.attention import attend, attention_weights
from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.processes import join_masks, split_streams
from slam_jax.slam_v3.streams import Stream


class CrossAttention(nnx.Module):
    """Plain attention from one set of tokens to another.

    It has no biases, so that the result is exactly 0 where there is nothing to attend to.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        heads = (config.num_heads, config.head_dim)
        self.query = Linear(config.embed_dim, heads, **kw)
        self.key = Linear(config.embed_dim, heads, **kw)
        self.value = Linear(config.embed_dim, heads, **kw)
        scale = config.encoder_out_scale
        self.out = Linear(heads, config.embed_dim, init_scale=scale, **kw)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        *,
        weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T S"] | None]:
        """What each token of x reads from the source, and with `weights` the attention weights."""
        mask = None if mask is None else mask[:, None, :]
        q, k = self.query(x), self.key(source)
        y = self.out(attend(q, k, self.value(source), mask))
        return y, attention_weights(q, k, mask) if weights else None


class CrossModal(nnx.Module):
    """Each stream's tokens attend to the tokens of the other streams only.

    Exactly 0 where there is no other stream, for the whole call or for one example.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.embed_dim, param_dtype=config.dtypes["param_dtype"])
        self.attention = CrossAttention(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S D"], streams: Sequence[Stream]
    ) -> Float[Array, "B S D"]:
        if len(streams) == 1:
            return jnp.zeros_like(x)
        parts = split_streams(self.norm(x), streams)
        read = []
        for i, part in enumerate(parts):
            others = [j for j in range(len(parts)) if j != i]
            source = jnp.concatenate([parts[j] for j in others], axis=1)
            mask = join_masks([streams[j] for j in others])
            read.append(self.attention(part, source, mask)[0])
        return jnp.concatenate(read, axis=1)


class Bottleneck(nnx.Module):
    """M learned queries attend to the fused tokens; one block of a Perceiver.

    Source: Jaegle et al. 2021, "Perceiver", section 3.1.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        param_dtype = config.dtypes["param_dtype"]
        shape = (config.num_memory_tokens, config.embed_dim)
        # A large standard deviation, so that the queries differ from the start.
        self.queries = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), shape, param_dtype))
        self.norm = RMSNorm(config.embed_dim, param_dtype=param_dtype)
        self.attention = CrossAttention(config, rngs=rngs)

    def __call__(
        self,
        f: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        *,
        weights: bool = False,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B N M S"] | None]:
        """The memory tokens, and with `weights` how much of each fused token each of them reads."""
        queries = self.queries[...].astype(f.dtype)
        queries = jnp.broadcast_to(queries, (f.shape[0], *queries.shape))
        read, attention = self.attention(queries, self.norm(f), mask, weights=weights)
        return queries + read, attention


class Fused(NamedTuple):
    """The memory tokens before they are compressed.

    mask: True = present; with a bottleneck all tokens of an example that has any input. None = all
    present. weights: how much of each input token each memory token has read, averaged over heads;
    the identity without a bottleneck. None = not asked for.
    """

    tokens: Float[Array, "B M D"]
    mask: Bool[Array, "B M"] | None
    weights: Float[Array, "B M S"] | None


class Fusion(nnx.Module):
    """f = x + mean_p y_p + W_cat [y_1; ..; y_P] + CrossModal(mean_p y_p); f += MLP(norm(f));
    then the bottleneck, if there is one. The parts in `config.without` are left out.

    one_stream: there is only ever one stream, so CrossModal has nothing to read and is left out.
    """

    def __init__(self, config: SlamV3Config, *, one_stream: bool = False, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, scale = config.embed_dim, config.encoder_out_scale
        self.dropout = config.dropout
        self.has_residual, self.has_mean = config.has("residual"), config.has("mean")
        concat_dim = config.num_processes * dim
        has_cross, has_mlp = config.has("cross_modal") and not one_stream, config.has("fusion_mlp")
        self.concat: Any = (
            Linear(concat_dim, dim, init_scale=scale, **kw) if config.has("concat") else None
        )
        self.cross_modal: Any = CrossModal(config, rngs=rngs) if has_cross else None
        self.norm: Any = RMSNorm(dim, param_dtype=kw["param_dtype"]) if has_mlp else None
        self.mlp = GatedMLP(dim, config.mlp_dim, out_scale=scale, **kw) if has_mlp else None
        self.bottleneck = Bottleneck(config, rngs=rngs) if config.num_memory_tokens else None

    def __call__(
        self,
        y: Float[Array, "P B S D"],
        streams: Sequence[Stream],
        *,
        key: PRNGKeyArray | None = None,
        weights: bool = False,
    ) -> Fused:
        f, mask = self._fuse(y, streams, split(key, 3))
        if self.bottleneck is None:
            identity = jnp.broadcast_to(jnp.eye(f.shape[1]), (*f.shape[:2], f.shape[1]))
            return Fused(f, mask, identity if weights else None)
        memory, attention = self.bottleneck(f, mask, weights=weights)
        if mask is not None:
            mask = jnp.broadcast_to(mask.any(axis=1, keepdims=True), memory.shape[:2])
        return Fused(memory, mask, None if attention is None else attention.mean(axis=1))

    def _fuse(self, y, streams, keys):
        mask = join_masks(streams)
        x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
        # Both sums over processes are needed on every device of the `process` axis.
        mean = constrain(jnp.mean(y, axis=0), ("batch",))
        f = x if self.has_residual else jnp.zeros_like(x)
        if self.has_mean:
            f += mean
        if self.concat is not None:
            joined = self.concat(einops.rearrange(y, "P B S D -> B S (P D)"))
            f += dropout(constrain(joined, ("batch",)), self.dropout, keys[0])
        if self.cross_modal is not None:
            f += dropout(self.cross_modal(mean, streams), self.dropout, keys[1])
        if self.mlp is not None:
            f += dropout(self.mlp(self.norm(f)), self.dropout, keys[2])
        return f, mask
