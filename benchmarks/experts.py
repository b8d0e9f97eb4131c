"""The mixture of experts on a CPU: `grouped_matmul` against `jax.lax.ragged_dot`.

    python -m benchmarks.experts

Times gradients of many tokens at even and uneven loads, and the output of one token. Arms
alternate; each line has the median and its ratio to the first arm.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.kernels.backend import for_accelerators
from slam_jax.layers.experts import Experts
from slam_jax.layers.router import Routing
from slam_jax.runtime.compile_cache import enable_compile_cache

ROUNDS, NUM_EXPERTS, K = 9, 8, 2
TOKENS, DIM, MLP = 2_048, 192, 512
# More kernels than a processor's cache holds, as in a model.
LAYERS, DECODE_DIM, DECODE_MLP = 6, 512, 2_048
ARMS = {"grouped_matmul": contextlib.nullcontext, "ragged_dot": for_accelerators}


def main() -> None:
    enable_compile_cache()
    for uneven in (0.0, 0.5):
        experts, x, routing = _make_inputs(TOKENS, DIM, MLP, uneven)

        def loss(experts, x, routing=routing):
            return (experts(x, routing) ** 2).sum()

        loads = jax.nn.one_hot(routing.experts, NUM_EXPERTS).sum((0, 1))
        print(f"gradients, largest load over the mean: {loads.max() / loads.mean():.1f}")
        compare(lambda *inputs, loss=loss: jax.grad(loss, (0, 1))(*inputs), (experts, x))
    layers = [_make_inputs(1, DECODE_DIM, DECODE_MLP) for _ in range(LAYERS)]

    def in_turn(layers):
        x = layers[0][1]
        for experts, _, routing in layers:
            x += experts(x, routing)
        return x

    print(f"one token, {LAYERS} layers")
    compare(in_turn, (layers,), rounds=10 * ROUNDS)


def compare(function: Callable, inputs: tuple, rounds: int = ROUNDS) -> None:
    compiled, seconds = {}, {arm: [] for arm in ARMS}
    for arm, form in ARMS.items():
        with form():
            # A new function for each arm: JAX caches traces by function.
            compiled[arm] = jax.jit(lambda *inputs: function(*inputs)).lower(*inputs).compile()
        jax.block_until_ready(compiled[arm](*inputs))
    for _ in range(rounds):
        for arm, call in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*inputs))
            seconds[arm].append(time.perf_counter() - start)
    first = statistics.median(seconds["grouped_matmul"])
    for arm, each in seconds.items():
        middle = statistics.median(each)
        print(f"  {arm}: {1e3 * middle:.3g} ms, {middle / first:.2f}")


def _make_inputs(
    tokens: int, dim: int, mlp: int, uneven: float = 0.0
) -> tuple[Experts, Any, Routing]:
    experts = Experts(NUM_EXPERTS, dim, mlp, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (tokens, dim))
    logits = jax.random.gumbel(jax.random.key(2), (tokens, NUM_EXPERTS))
    skewed = logits + uneven * jnp.arange(NUM_EXPERTS)[None]
    return experts, x, Routing(*jax.lax.top_k(skewed, K), logits)


if __name__ == "__main__":
    main()
