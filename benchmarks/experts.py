"""Experts on this machine: gradients of many tokens, with blocks in a loop, all blocks at once, and
every token through every expert, at even and at uneven loads; and the output of one token.

    python benchmarks/experts.py

Arms alternate; each line has the medians and their ratio to the first.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.layers import experts as layer
from slam_jax.layers.experts import Experts
from slam_jax.layers.router import Routing
from slam_jax.runtime.compile_cache import enable_compile_cache

ROUNDS, NUM_EXPERTS, K = 9, 8, 2
TOKENS, DIM, MLP = 2_048, 192, 512
# More kernels than a processor's cache holds, as in a model.
LAYERS, DECODE_DIM, DECODE_MLP = 6, 512, 2_048
# Whether blocks are gone through in a loop, and up to how many tokens every expert sees all.
ARMS = {"in a loop": (True, 0), "at once": (False, 0), "every expert": (True, TOKENS)}


def main() -> None:
    enable_compile_cache()
    for uneven in (0.0, 0.5):
        experts, x, routing = _given(TOKENS, DIM, MLP, uneven)

        def loss(experts, x, routing=routing):
            return (experts(x, routing) ** 2).sum()

        loads = jax.nn.one_hot(routing.experts, NUM_EXPERTS).sum((0, 1))
        print(f"gradients, largest load over the mean: {loads.max() / loads.mean():.1f}")
        compare(ARMS, lambda *given, loss=loss: jax.grad(loss, (0, 1))(*given), (experts, x))
    layers = [_given(1, DECODE_DIM, DECODE_MLP) for _ in range(LAYERS)]

    def in_turn(layers):
        x = layers[0][1]
        for experts, _, routing in layers:
            x += experts(x, routing)
        return x

    print(f"one token, {LAYERS} layers")
    few = {arm: ARMS[arm] for arm in ("in a loop", "at once")}
    compare(few, in_turn, (layers,), rounds=10 * ROUNDS)


def compare(
    arms: dict[str, tuple[bool, int]], function: Callable, given: tuple, rounds: int = ROUNDS
) -> None:
    programs, seconds = {}, {arm: [] for arm in arms}
    for arm, (loops, few) in arms.items():
        layer._loops, layer._FEW = lambda loops=loops: loops, few
        # A function of its own: traces are kept by function, whatever was set in between.
        programs[arm] = jax.jit(lambda *given: function(*given)).lower(*given).compile()
        jax.block_until_ready(programs[arm](*given))
    for _ in range(rounds):
        for arm, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[arm].append(time.perf_counter() - start)
    first = statistics.median(seconds["in a loop"])
    for arm, each in seconds.items():
        middle = statistics.median(each)
        print(f"  {arm}: {1e3 * middle:.3g} ms, {middle / first:.2f}")


def _given(tokens: int, dim: int, mlp: int, uneven: float = 0.0) -> tuple[Experts, Any, Routing]:
    experts = Experts(NUM_EXPERTS, dim, mlp, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (tokens, dim))
    logits = jax.random.gumbel(jax.random.key(2), (tokens, NUM_EXPERTS))
    return experts, x, Routing(*jax.lax.top_k(logits + uneven * jnp.arange(NUM_EXPERTS), K), logits)


if __name__ == "__main__":
    main()
