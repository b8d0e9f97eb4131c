"""Level 1, the bank that everybody reads, and the four processes that run side by side."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from slam_jax.layers.attention import SelfAttention, attend, attention_weights
from slam_jax.layers.constrain import constrain
from slam_jax.layers.dropout import dropout, split
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.remat import remat
from slam_jax.slam_v3.block import TransformerBlock
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.streams import Stream


class Bank(NamedTuple):
    """Keys and values of all streams, made once and read by every layer of every process."""

    k: Float[Array, "B S N H"]
    v: Float[Array, "B S N H"]
    mask: Bool[Array, "B 1 S"] | None


def join_masks(streams: Sequence[Stream]) -> Bool[Array, "B S"] | None:
    """The mask of the concatenated streams; None where all of every stream is present."""
    if all(stream.mask is None for stream in streams):
        return None
    full = [
        jnp.ones(stream.tokens.shape[:2], bool) if stream.mask is None else stream.mask
        for stream in streams
    ]
    return jnp.concatenate(full, axis=1)


def _join_positions(streams: Sequence[Stream]) -> Int[Array, "S"] | None:
    """Positions of the concatenation, 0 (no rotation) for tokens that have none."""
    if all(stream.positions is None for stream in streams):
        return None
    zeros = [jnp.zeros(stream.tokens.shape[1], jnp.int32) for stream in streams]
    pairs = zip(streams, zeros, strict=True)
    return jnp.concatenate([zero if s.positions is None else s.positions for s, zero in pairs])


def split_streams(x: Float[Array, "*B S D"], streams: Sequence[Stream]) -> list[jax.Array]:
    """The parts of a concatenation, in the order of `streams`."""
    ends = itertools.accumulate(stream.tokens.shape[1] for stream in streams)
    return jnp.split(x, list(ends)[:-1], axis=-2)


class LevelOne(nnx.Module):
    """One block over all streams, so that "12" is bound to "red" before anybody reads it; and the
    bank, made from its output.

    Source: the first of the three levels of SLAM v3, whose keys and values are kept.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        self.block = TransformerBlock(config, rngs=rngs)
        self.has_bank = config.has("shared")
        if self.has_bank:
            self.norm = RMSNorm(config.embed_dim, param_dtype=kw["param_dtype"])
            heads = (config.num_heads, config.head_dim)
            self.key = Linear(config.embed_dim, heads, **kw)
            self.value = Linear(config.embed_dim, heads, **kw)

    def __call__(
        self, streams: Sequence[Stream], *, key: PRNGKeyArray | None = None
    ) -> tuple[list[Stream], Bank | None]:
        """The streams, each with its tokens in the context of all, and the bank, where processes
        read one."""
        x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
        mask = join_masks(streams)
        mask = None if mask is None else mask[:, None, :]
        x = self.block(x, mask, _join_positions(streams), key=key)
        parts = split_streams(x, streams)
        streams = [s._replace(tokens=part) for s, part in zip(streams, parts, strict=True)]
        if not self.has_bank:
            return streams, None
        source = self.norm(x)
        return streams, Bank(self.key(source), self.value(source), mask)


class ProcessLayer(nnx.Module):
    """Isolated attention, shared attention, MLP; each pre-norm and residual."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, heads = config.embed_dim, (config.num_heads, config.head_dim)
        scale = config.encoder_out_scale
        self.dropout = config.dropout
        there = (config.has("isolated"), config.has("shared"), True)
        self.num_heads, (has_isolated, has_shared, _) = config.num_heads, there
        self.norms: Any = nnx.List(
            [RMSNorm(dim, param_dtype=kw["param_dtype"]) if part else None for part in there]
        )
        self.isolated = SelfAttention(dim, *heads, out_scale=scale, **kw) if has_isolated else None
        if has_shared:
            self.query = Linear(dim, heads, **kw)
            normal = nnx.initializers.normal(0.02)
            self.query_bias = nnx.Param(normal(rngs.params(), heads, kw["param_dtype"]))
            self.out = Linear(heads, dim, init_scale=scale, **kw)
        mlp_dim = config.process_mlp_dim or config.mlp_dim
        self.mlp = GatedMLP(dim, mlp_dim, out_scale=scale, **kw)

    def __call__(
        self,
        h: Float[Array, "B S D"],
        streams: Sequence[Stream],
        bank: Bank | None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B S D"]:
        keys = split(key, 3)
        h = h + dropout(self._isolated(h, streams), self.dropout, keys[0])
        if bank is not None:
            read = self.out(attend(self._queries(h), bank.k, bank.v, bank.mask))
            h = h + dropout(read, self.dropout, keys[1])
        return h + dropout(self.mlp(self.norms[2](h)), self.dropout, keys[2])

    def shared_weights(
        self, h: Float[Array, "B S D"], streams: Sequence[Stream], bank: Bank | None
    ) -> Float[Array, "B N S S"]:
        """How much each token, as the layer is given it, attends to each token of the bank."""
        if bank is None:
            return jnp.zeros((h.shape[0], self.num_heads, h.shape[1], h.shape[1]))
        h = h + self._isolated(h, streams)
        return attention_weights(self._queries(h), bank.k, bank.mask)

    def _queries(self, h):
        q = self.query(self.norms[1](h))
        return q + self.query_bias[...].astype(q.dtype)

    def _isolated(self, h, streams):
        """A token sees its own stream only: one call a stream instead of one S x S mask."""
        if self.isolated is None:
            return jnp.zeros_like(h)
        parts = []
        for part, stream in zip(split_streams(self.norms[0](h), streams), streams, strict=True):
            mask = None if stream.mask is None else stream.mask[:, None, :]
            parts.append(self.isolated(part, mask, stream.positions))
        return jnp.concatenate(parts, axis=1)


class Process(nnx.Module):
    """One of the four encoders: an input bias of its own (its "instruction") and its layers."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        param_dtype = config.dtypes["param_dtype"]
        normal = nnx.initializers.normal(0.02)
        self.remat = config.remat
        self.instruction = nnx.Param(normal(rngs.params(), (config.embed_dim,), param_dtype))
        self.layers = nnx.List(
            [ProcessLayer(config, rngs=rngs) for _ in range(config.num_process_layers)]
        )
        # The fusion node adds y_p to the tokens: it starts as small as any other addition.
        scale = config.encoder_out_scale
        self.norm = RMSNorm(config.embed_dim, init_scale=scale, param_dtype=param_dtype)

    def __call__(
        self, streams: Sequence[Stream], bank: Bank | None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "B S D"]:
        h = self._instructed(streams)
        for layer, layer_key in zip(self.layers, split(key, len(self.layers)), strict=True):
            h = remat(layer, self.remat)(h, streams, bank, key=layer_key)
        return self.norm(h)

    def shared_weights(
        self, streams: Sequence[Stream], bank: Bank | None
    ) -> Float[Array, "B layers N S S"]:
        """How much each head of each layer attends to each token of the bank."""
        h, weights = self._instructed(streams), []
        for layer in self.layers:
            weights.append(layer.shared_weights(h, streams, bank))
            h = layer(h, streams, bank)
        return jnp.stack(weights, axis=1)

    def _instructed(self, streams):
        x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
        return x + self.instruction[...].astype(x.dtype)


class ParallelProcesses(nnx.Module):
    """P processes with weights of their own on a leading axis, as one vmap.

    No gate, no top-k: all of them run, always. They start from different keys and drop out by
    different keys.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), config.num_processes)
        self.num_processes = config.num_processes
        self.stack = jax.vmap(lambda key: Process(config, rngs=nnx.Rngs(key)))(keys)

    def __call__(
        self, streams: Sequence[Stream], bank: Bank | None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "P B S D"]:
        keys = None if key is None else jax.random.split(key, self.num_processes)

        def run(process: Process, key: PRNGKeyArray | None) -> jax.Array:
            return process(streams, bank, key=key)

        y = jax.vmap(run, spmd_axis_name="process")(self.stack, keys)
        return constrain(y, ("process", "batch"))

    def shared_weights(
        self, streams: Sequence[Stream], bank: Bank | None
    ) -> Float[Array, "P B layers N S S"]:
        """How much each process attends to each token of the bank."""
        return jax.vmap(lambda process: process.shared_weights(streams, bank))(self.stack)
