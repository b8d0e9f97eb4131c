"""The encoder: a joint block over all streams, then four encoder processes in parallel.

A "process" is a part of the model in this package, never one of the operating system.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from slam_jax.layers.attention import SelfAttention, attend_rotated
from slam_jax.layers.constrain import constrain, gather_rows, taken
from slam_jax.layers.dropout import DropoutKey, dropout, split
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.stacked import equal_layers, run_layers
from slam_jax.slam_v3.block import TransformerBlock
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.shared_attention import Bank, SharedAttention
from slam_jax.slam_v3.streams import Stream, join_streams, split_streams


class JointBlock(nnx.Module):
    """One transformer block over the tokens of all streams, and the bank made from its output.

    The block binds words to each other ("12" to "red") before the encoder processes read them.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        self.block = TransformerBlock(config, rngs=rngs)
        self.has_bank, self.rotates_all = config.has("shared"), config.rotate_all_streams
        if self.has_bank:
            kw = dict(**config.dtypes, rngs=rngs)
            norm: Any = dict(param_dtype=kw["param_dtype"])
            self.norm = RMSNorm(config.embed_dim, **norm)
            self.key = Linear(config.embed_dim, config.shared_heads, **kw)
            self.value = Linear(config.embed_dim, config.shared_heads, **kw)
            self.k_norm = RMSNorm(config.shared_heads[1], **norm) if config.qk_norm else None

    def __call__(
        self, streams: Sequence[Stream], *, key: DropoutKey = None
    ) -> tuple[list[Stream], Bank | None]:
        """The streams with contextualised tokens, and the bank (None without shared attention)."""
        joined = join_streams(streams)
        # The stream with positions, the text, comes first.
        positions = joined.positions if self.rotates_all else streams[0].positions
        x = self.block(joined.tokens, joined.visible, positions, key=key)
        bank = self._make_bank(x, joined.visible) if self.has_bank else None
        return split_streams(x, streams), bank

    def _make_bank(self, x: Float[Array, "B S D"], visible: Bool[Array, "B 1 S"] | None) -> Bank:
        source = self.norm(x)
        k = self.key(source) if self.k_norm is None else self.k_norm(self.key(source))
        return Bank(k, self.value(source), visible)


class ProcessLayer(SharedAttention):
    """Isolated attention, shared attention, MLP; each pre-norm and residual.

    It extends `SharedAttention` instead of holding one, so that the parameters have the paths that
    checkpoints of earlier versions have.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, scale = config.embed_dim, config.encoder_out_scale
        self.dropout = config.dropout
        has_isolated, has_shared = config.has("isolated"), config.has("shared")
        self.norms: Any = nnx.List(
            [
                RMSNorm(dim, param_dtype=kw["param_dtype"]) if exists else None
                for exists in (has_isolated, has_shared, True)
            ]
        )
        heads = (config.num_heads, config.head_dim)
        self.isolated: Any = (
            SelfAttention(dim, *heads, qk_norm=config.qk_norm, out_scale=scale, **kw)
            if has_isolated
            else None
        )
        if has_shared:
            super().__init__(config, rngs=rngs)  # adds query, query_bias and out
        mlp_dim = config.process_mlp_dim or config.mlp_dim
        self.mlp = GatedMLP(dim, mlp_dim, out_scale=scale, **kw)

    def __call__(
        self,
        h: Float[Array, "B S D"],
        streams: Sequence[Stream],
        bank: Bank | None,
        *,
        key: DropoutKey = None,
        with_weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B N S S"] | None]:
        """The new tokens, and the weights of the shared attention if asked for, else None."""
        keys, weights = split(key, 3), None
        if self.isolated is not None:
            h = h + dropout(self._isolated_attention(h, streams), self.dropout, keys[0])
        if bank is not None:
            x = self.norms[1](h)
            read, weights = self.read(x, bank, with_weights=with_weights)
            h = h + dropout(read, self.dropout, keys[1])
        return h + dropout(self.mlp(self.norms[2](h)), self.dropout, keys[2]), weights

    def _isolated_attention(self, h, streams) -> Float[Array, "B S D"]:
        """Each token attends to its own stream: one call per stream instead of an S x S mask.

        The maps to queries, keys and values, and from what was read, run once for all streams."""
        x, maps = self.norms[0](h), self.isolated
        ends = np.cumsum([stream.tokens.shape[1] for stream in streams])[:-1]
        q, k, v = (
            jnp.split(y, ends, axis=1) for y in (maps.queries(x), maps.keys(x), maps.value(x))
        )
        read = [
            attend_rotated(q[i], k[i], v[i], stream.visible, stream.positions)
            for i, stream in enumerate(streams)
        ]
        return maps.out(jnp.concatenate(read, axis=1))


class Process(nnx.Module):
    """One encoder process: its own input bias (the "instruction") and its own layers."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        param_dtype, num_layers = config.dtypes["param_dtype"], config.num_process_layers
        normal = nnx.initializers.normal(0.02)
        self.remat = config.remat
        self.instruction = nnx.Param(normal(rngs.params(), (config.embed_dim,), param_dtype))
        layer = functools.partial(ProcessLayer, config)
        self.layers = equal_layers(config.scan_layers, num_layers, layer, rngs=rngs)
        # The fusion adds y_p to the tokens, so y_p starts as small as what a sublayer adds.
        scale = config.encoder_out_scale
        self.norm = RMSNorm(config.embed_dim, init_scale=scale, param_dtype=param_dtype)

    def __call__(
        self,
        streams: Sequence[Stream],
        bank: Bank | None,
        *,
        key: DropoutKey = None,
        with_weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B layers N S S"] | None]:
        """y_p of this process, and the weights of its shared attention if asked for, else None."""

        def call(layer: ProcessLayer, h: Any, key: DropoutKey):
            return layer(h, streams, bank, key=key, with_weights=with_weights)

        x = join_streams(streams).tokens
        h = x + self.instruction[...].astype(x.dtype)[None, None]
        keys = split(key, len(self.layers))
        h, weights = run_layers(call, self.layers, h, keys, policy=self.remat)
        has_weights = with_weights and bank is not None
        return self.norm(h), jnp.stack(weights, axis=1) if has_weights else None


class ParallelProcesses(nnx.Module):
    """P encoder processes as one vmap; their parameters have a leading axis P.

    No gate, no top-k: all of them always run. Each has its own keys for initial values and dropout.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), config.num_processes)
        self.num_processes = config.num_processes
        # Shardings and Muon know stacked parameters by this name.
        self.stack = jax.vmap(lambda key: Process(config, rngs=nnx.Rngs(key)))(keys)

    def __call__(
        self,
        streams: Sequence[Stream],
        bank: Bank | None,
        *,
        key: DropoutKey = None,
        with_weights: bool = False,
    ) -> tuple[Float[Array, "P B S D"], Float[Array, "P B layers N S S"] | None]:
        """The y_p of all processes, and the weights of their shared attention if asked for."""
        keys = None if key is None else jax.random.split(key, self.num_processes)

        def run(process: Process, key: DropoutKey):
            return process(streams, bank, key=key, with_weights=with_weights)

        # The name tells constraints and `shard_map` inside a process which mesh axis P is on.
        mapped = jax.vmap(run, spmd_axis_name="process")
        # Each process reads all rows of the batch; devices gather them once, here.
        streams = [s._replace(tokens=gather_rows(s.tokens)) for s in streams]
        bank = gather_rows(bank)
        with taken("process"):
            y, weights = mapped(self.stack, keys)
        return constrain(y, ("process", "batch")), weights
