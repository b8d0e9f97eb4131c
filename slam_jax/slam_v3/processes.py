"""Level 1, the shared bank of keys and values, and the four processes that run in parallel."""

import functools
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
    """Keys and values of all streams, computed once and read by every layer of every process."""

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
    """Positions of the concatenation; tokens without one get 0, which is no rotation.

    Keys and queries of the bank are not rotated: the order of words reaches it through this block.
    """
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
    """One transformer block over all streams, and the bank computed from its output.

    The block binds words to each other ("12" to "red") before the processes read them.
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
        """The streams with contextualised tokens, and the bank (None without shared attention)."""
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
        has_isolated, has_shared = config.has("isolated"), config.has("shared")
        self.norms: Any = nnx.List(
            [
                RMSNorm(dim, param_dtype=kw["param_dtype"]) if exists else None
                for exists in (has_isolated, has_shared, True)
            ]
        )
        self.isolated: Any = (
            SelfAttention(dim, *heads, out_scale=scale, **kw) if has_isolated else None
        )
        if has_shared:
            self.query = Linear(dim, heads, **kw)
            # A learned bias of the queries lets each process ask the shared bank something else.
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
        weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B N S S"] | None]:
        """The new tokens, and with `weights` the attention weights of the bank (else None)."""
        keys, shared_weights = split(key, 3), None
        if self.isolated is not None:
            h = h + dropout(self._isolated_attention(h, streams), self.dropout, keys[0])
        if bank is not None:
            q = self.query(self.norms[1](h))
            q = q + self.query_bias[None, None].astype(q.dtype)
            read = self.out(attend(q, bank.k, bank.v, bank.mask))
            shared_weights = attention_weights(q, bank.k, bank.mask) if weights else None
            h = h + dropout(read, self.dropout, keys[1])
        return h + dropout(self.mlp(self.norms[2](h)), self.dropout, keys[2]), shared_weights

    def _isolated_attention(self, h, streams) -> Float[Array, "B S D"]:
        """Each token attends to its own stream: one call per stream instead of an S x S mask."""
        parts = []
        for part, stream in zip(split_streams(self.norms[0](h), streams), streams, strict=True):
            mask = None if stream.mask is None else stream.mask[:, None, :]
            parts.append(self.isolated(part, mask, stream.positions))
        return jnp.concatenate(parts, axis=1)


class Process(nnx.Module):
    """One of the four encoders: its own input bias (the "instruction") and its own layers."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        param_dtype = config.dtypes["param_dtype"]
        normal = nnx.initializers.normal(0.02)
        self.remat = config.remat
        self.instruction = nnx.Param(normal(rngs.params(), (config.embed_dim,), param_dtype))
        self.layers = nnx.List(
            [ProcessLayer(config, rngs=rngs) for _ in range(config.num_process_layers)]
        )
        # The fusion adds y_p to the tokens, so y_p starts as small as what a sublayer adds.
        scale = config.encoder_out_scale
        self.norm = RMSNorm(config.embed_dim, init_scale=scale, param_dtype=param_dtype)

    def __call__(
        self,
        streams: Sequence[Stream],
        bank: Bank | None,
        *,
        key: PRNGKeyArray | None = None,
        weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B layers N S S"] | None]:
        """y of this process, and with `weights` the attention weights of the bank (else None)."""
        x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
        h, layer_weights = x + self.instruction[None, None].astype(x.dtype), []
        for layer, layer_key in zip(self.layers, split(key, len(self.layers)), strict=True):
            call = functools.partial(layer, weights=weights)
            h, shared_weights = remat(call, self.remat)(h, streams, bank, key=layer_key)
            layer_weights.append(shared_weights)
        found = weights and bank is not None
        return self.norm(h), jnp.stack(layer_weights, axis=1) if found else None


class ParallelProcesses(nnx.Module):
    """P processes as one vmap; their parameters have a leading axis P.

    No gate, no top-k: all of them always run. Each has its own keys for initial values and dropout.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), config.num_processes)
        self.num_processes = config.num_processes
        self.stack = jax.vmap(lambda key: Process(config, rngs=nnx.Rngs(key)))(keys)

    def __call__(
        self,
        streams: Sequence[Stream],
        bank: Bank | None,
        *,
        key: PRNGKeyArray | None = None,
        weights: bool = False,
    ) -> tuple[Float[Array, "P B S D"], Float[Array, "P B layers N S S"] | None]:
        """y of every process, and with `weights` the attention weights of the bank (else None)."""
        keys = None if key is None else jax.random.split(key, self.num_processes)

        def run(process: Process, key: PRNGKeyArray | None):
            return process(streams, bank, key=key, weights=weights)

        y, shared_weights = jax.vmap(run, spmd_axis_name="process")(self.stack, keys)
        return constrain(y, ("process", "batch")), shared_weights
