"""The fusion: from the outputs of the four encoder processes to one set of memory tokens."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import einops
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from slam_jax.layers import attention
from slam_jax.layers.constrain import divide_rows
from slam_jax.layers.dropout import DropoutKey, dropout, split
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.stacked import equal_layers, run_layers
from slam_jax.slam_v3.block import TransformerBlock
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.streams import Stream, join_streams, split_streams


class CrossAttention(attention.SelfAttention):
    """Attention from one set of tokens to another.

    Its maps are those of `SelfAttention`. They have no biases, so that the result is exactly 0
    where there is nothing to attend to.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        heads, scale = (config.num_heads, config.head_dim), config.encoder_out_scale
        kw: Any = dict(qk_norm=config.qk_norm, out_scale=scale, **config.dtypes, rngs=rngs)
        super().__init__(config.embed_dim, *heads, **kw)

    def read(
        self, x: Float[Array, "B T D"], source: Stream, *, with_weights: bool = False
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T S"] | None]:
        """What each token of x reads from the source, and the weights if asked for, else None."""
        q, k, v = self.queries(x), self.keys(source.tokens), self.value(source.tokens)
        y = self.out(attention.attend(q, k, v, source.visible))
        if not with_weights:
            return y, None
        return y, attention.attention_weights(q, k, source.visible)


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
        parts, read = split_streams(self.norm(x), streams), []
        for i, part in enumerate(parts):
            others = join_streams(parts[:i] + parts[i + 1 :])
            read.append(self.attention.read(part.tokens, others)[0])
        return jnp.concatenate(read, axis=1)


class Bottleneck(nnx.Module):
    """M learned queries attend to the fused tokens; then transformer blocks over the M tokens.

    `config.num_bottleneck_blocks` sets the number of these blocks.
    Source: Jaegle et al. 2021, "Perceiver", section 3.1.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        param_dtype = config.dtypes["param_dtype"]
        shape = (config.num_memory_tokens, config.embed_dim)
        # A large standard deviation, so that the queries differ from the start.
        self.queries = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), shape, param_dtype))
        self.norm = RMSNorm(config.embed_dim, param_dtype=param_dtype)
        self.attention = CrossAttention(config, rngs=rngs)
        self.remat, count = config.remat, config.num_bottleneck_blocks
        block = functools.partial(TransformerBlock, config)
        self.blocks = equal_layers(config.scan_layers, count, block, rngs=rngs)

    def __call__(
        self,
        f: Float[Array, "B S D"],
        mask: Bool[Array, "B S"] | None,
        *,
        key: DropoutKey = None,
        with_weights: bool = False,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B N M S"] | None]:
        """The memory tokens, and how much of each fused token they read if asked for."""
        queries = self.queries[...].astype(f.dtype)
        queries = jnp.broadcast_to(queries[None], (f.shape[0], *queries.shape))
        source = Stream(self.norm(f), mask)
        read, found = self.attention.read(queries, source, with_weights=with_weights)
        memory, _ = run_layers(
            lambda block, memory, key: (block(memory, key=key), None),
            self.blocks,
            queries + read,
            split(key, len(self.blocks)),
            policy=self.remat,
        )
        return memory, found


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
    then the bottleneck, if there is one. x: the tokens of all streams after the joint block. The
    parts in `config.without` are left out.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, scale = config.embed_dim, config.encoder_out_scale
        self.dropout = config.dropout
        self.has_residual, self.has_mean = config.has("residual"), config.has("mean")
        has_concat, has_mlp = config.has("concat"), config.has("fusion_mlp")
        all_dim = config.num_processes * dim
        self.concat: Any = Linear(all_dim, dim, init_scale=scale, **kw) if has_concat else None
        self.cross_modal: Any = CrossModal(config, rngs=rngs) if config.has("cross_modal") else None
        self.norm: Any = RMSNorm(dim, param_dtype=kw["param_dtype"]) if has_mlp else None
        self.mlp: Any = GatedMLP(dim, config.mlp_dim, out_scale=scale, **kw) if has_mlp else None
        self.bottleneck = Bottleneck(config, rngs=rngs) if config.num_memory_tokens else None

    def __call__(
        self,
        y: Float[Array, "P B S D"],
        streams: Sequence[Stream],
        *,
        key: DropoutKey = None,
        with_weights: bool = False,
    ) -> Fused:
        joined = join_streams(streams)
        keys = split(key, 4 if self.bottleneck is not None and len(self.bottleneck.blocks) else 3)
        mask: Any = joined.mask
        mean = divide_rows(jnp.mean(y, axis=0))
        f = joined.tokens if self.has_residual else jnp.zeros_like(joined.tokens)
        if self.has_mean:
            f += mean
        if self.concat is not None:
            concatenated = self.concat(einops.rearrange(y, "P B S D -> B S (P D)"))
            f += dropout(divide_rows(concatenated), self.dropout, keys[0])
        if self.cross_modal is not None:
            f += dropout(self.cross_modal(mean, streams), self.dropout, keys[1])
        if self.mlp is not None:
            f += dropout(self.mlp(self.norm(f)), self.dropout, keys[2])
        if self.bottleneck is None:
            identity = jnp.broadcast_to(jnp.eye(f.shape[1])[None], (*f.shape[:2], f.shape[1]))
            return Fused(f, mask, identity if with_weights else None)
        memory, weights = self.bottleneck(f, mask, key=keys[-1], with_weights=with_weights)
        if mask is not None:
            mask = jnp.broadcast_to(mask.any(axis=1, keepdims=True), memory.shape[:2])
        return Fused(memory, mask, None if weights is None else weights.mean(axis=1))
