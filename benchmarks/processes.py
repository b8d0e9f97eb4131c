"""SLAM v3's four processes: one vmap against one after the other, one device against two.

Forward and gradient of the processes on image tokens, at the widths of the quickstart. Many
examples keep the cores busy in either form; one example does not.
"""

import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.comparison import Arm, Comparison

_TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    many, length = (2, 8) if quick else (64, 100)
    for rows in (1, many):
        given = {"preset": "tiny" if quick else "small", "rows": rows, "length": length}
        yield Comparison(
            f"four processes, {rows} x {length} tokens, gradient",
            [
                Arm("one vmap", gradient, {**given, "in_turn": False}),
                Arm("one after the other", gradient, {**given, "in_turn": True}, aim=1.2),
            ],
            tolerance=1e-4,
            repeats=3 if rows == many else 20,
        )
    yield Comparison(
        f"four processes, {many} x {length} tokens, gradient, two virtual devices",
        [
            Arm("mesh.process=2", gradient, {**given, "devices": 2}, _TWO_DEVICES),
            Arm("one device", gradient, given, aim=1.0),
        ],
        tolerance=1e-4,
    )


def gradient(preset: str, rows: int, length: int, in_turn: bool = False, devices: int = 1) -> Any:
    """The gradient of a random sum of the processes' outputs with respect to the tokens
    [rows, length, D], divided by its largest number. Also computes those of the parameters."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.slam_v3 import SlamV3Config
    from slam_jax.slam_v3.processes import JointBlock, ParallelProcesses
    from slam_jax.slam_v3.streams import Stream
    from slam_jax.training.mesh import MeshConfig, make_mesh
    from slam_jax.training.sharding import shardings_of, use_mesh
    from slam_jax.training.state import merge_model, split_model

    enable_compile_cache()
    config = SlamV3Config.preset(preset, 1)

    class Part(nnx.Module):
        """Parameters have the names of the whole model, for the sharding rules."""

        def __init__(self):
            self.level_one = JointBlock(config, rngs=nnx.Rngs(0))
            self.processes = ParallelProcesses(config, rngs=nnx.Rngs(1))

    graphdef, params = split_model(jax.jit(Part)())
    mesh = make_mesh(MeshConfig(1, process=devices), devices=jax.devices()[:devices])
    params = jax.device_put(params, shardings_of(params, mesh))
    x = jax.random.normal(jax.random.key(2), (rows, length, config.embed_dim))
    # Not their mean square, which is nearly constant because the outputs are normalised.
    weights = jax.random.normal(jax.random.key(3), (config.num_processes, *x.shape))

    def loss(params, x):
        part = merge_model(graphdef, params)
        streams, bank = part.level_one([Stream(x, None, None)])
        run = functools.partial(_in_turn, part.processes) if in_turn else part.processes
        y, _ = run(streams, bank)
        return jnp.vdot(weights, y)

    def both(params, x):
        gradients, x_gradient = jax.grad(loss, (0, 1))(params, x)
        return x_gradient / jnp.max(jnp.abs(x_gradient)), gradients

    compiled = jax.jit(both)

    def call():
        with use_mesh(mesh):
            return jax.block_until_ready(compiled(params, x))[0]

    return call


def _in_turn(processes: Any, streams: Any, bank: Any) -> Any:
    import jax
    import jax.numpy as jnp

    every = [
        jax.tree.map(lambda leaf, p=p: leaf[p], processes.stack)
        for p in range(processes.num_processes)
    ]
    return jnp.stack([process(streams, bank)[0] for process in every]), None
