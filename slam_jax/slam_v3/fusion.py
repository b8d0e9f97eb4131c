"""The fusion node: where the four processes become one memory."""

from collections.abc import Sequence
from typing import Any

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
    """Plain attention from one set of tokens to another; no biases, so nothing read is 0."""

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
    ) -> Float[Array, "B T D"]:
        mask = None if mask is None else mask[:, None, :]
        return self.out(attend(self.query(x), self.key(source), self.value(source), mask))

    def weights(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
    ) -> Float[Array, "B N T S"]:
        """How much each head of each token of x attends to each token of the source."""
        mask = None if mask is None else mask[:, None, :]
        return attention_weights(self.query(x), self.key(source), mask)


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
            read.append(self.attention(part, source, join_masks([streams[j] for j in others])))
        return jnp.concatenate(read, axis=1)


class Bottleneck(nnx.Module):
    """M learned queries read the fused tokens; one block of a Perceiver.

    Source: Jaegle et al. 2021, "Perceiver", section 3.1.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        param_dtype = config.dtypes["param_dtype"]
        shape = (config.num_memory_tokens, config.embed_dim)
        # Wide, so that the queries differ from the start.
        self.queries = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), shape, param_dtype))
        self.norm = RMSNorm(config.embed_dim, param_dtype=param_dtype)
        self.attention = CrossAttention(config, rngs=rngs)

    def __call__(
        self, f: Float[Array, "B S D"], mask: Bool[Array, "B S"] | None
    ) -> Float[Array, "B M D"]:
        queries = self._queries(f)
        return queries + self.attention(queries, self.norm(f), mask)

    def weights(
        self, f: Float[Array, "B S D"], mask: Bool[Array, "B S"] | None
    ) -> Float[Array, "B N M S"]:
        """How much of each fused token each memory token reads."""
        return self.attention.weights(self._queries(f), self.norm(f), mask)

    def _queries(self, f):
        queries = self.queries[...].astype(f.dtype)
        return jnp.broadcast_to(queries, (f.shape[0], *queries.shape))


class Fusion(nnx.Module):
    """f = x + mean_p y_p + W_cat [y_1; ..; y_P] + CrossModal(mean_p y_p); f += MLP(norm(f));
    then the bottleneck, if there is one. What `config.without` names is left out.

    one_stream: there is never more than one, and hence nothing that CrossModal could read.
    """

    def __init__(self, config: SlamV3Config, *, one_stream: bool = False, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, scale = config.embed_dim, config.encoder_out_scale
        self.dropout = config.dropout
        self.has_residual, self.has_mean = config.has("residual"), config.has("mean")
        wide = config.num_processes * dim
        has_cross, has_mlp = config.has("cross_modal") and not one_stream, config.has("fusion_mlp")
        self.concat: Any = (
            Linear(wide, dim, init_scale=scale, **kw) if config.has("concat") else None
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
    ) -> tuple[Float[Array, "B M D"], Bool[Array, "B M"] | None]:
        """The memory and which of its tokens are there.

        With a bottleneck every memory token is there, unless the example has no input at all.
        """
        f, mask = self._fuse(y, streams, split(key, 3))
        if self.bottleneck is None:
            return f, mask
        memory = self.bottleneck(f, mask)
        if mask is not None:
            mask = jnp.broadcast_to(mask.any(axis=1, keepdims=True), memory.shape[:2])
        return memory, mask

    def memory_weights(
        self, y: Float[Array, "P B S D"], streams: Sequence[Stream]
    ) -> Float[Array, "B M S"]:
        """How much of each token each memory token has read, averaged over the bottleneck's heads;
        without a bottleneck the memory is the tokens."""
        f, mask = self._fuse(y, streams, split(None, 3))
        if self.bottleneck is None:
            return jnp.broadcast_to(jnp.eye(f.shape[1]), (f.shape[0], f.shape[1], f.shape[1]))
        return self.bottleneck.weights(f, mask).mean(axis=1)

    def _fuse(self, y, streams, keys):
        mask = join_masks(streams)
        x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
        # The two sums over processes, each made where it is needed: everywhere.
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
