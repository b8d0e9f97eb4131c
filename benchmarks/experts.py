"""Experts' gradients on this machine: blocks in a loop, all blocks at once, and every token through
every expert, at even and at uneven loads.

    python benchmarks/experts.py

Arms alternate; each line has the medians and their ratio to the first.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from slam_jax.layers import experts as layer
from slam_jax.layers.experts import Experts
from slam_jax.layers.router import Routing

ROUNDS, TOKENS, NUM_EXPERTS, K, DIM, MLP = 9, 2_048, 8, 2, 192, 512
# Whether blocks are gone through in a loop, and up to how many tokens every expert sees all.
ARMS = {"in a loop": (True, 0), "at once": (False, 0), "every expert": (True, TOKENS)}


def main() -> None:
    experts = Experts(NUM_EXPERTS, DIM, MLP, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (TOKENS, DIM))
    for uneven in (0.0, 0.5):
        logits = jax.random.gumbel(jax.random.key(2), (TOKENS, NUM_EXPERTS))
        routing = Routing(*jax.lax.top_k(logits + uneven * jnp.arange(NUM_EXPERTS), K), logits)

        def loss(experts, x, routing=routing):
            return (experts(x, routing) ** 2).sum()

        programs, seconds = {}, {arm: [] for arm in ARMS}
        for arm, (loops, few) in ARMS.items():
            layer._loops, layer._FEW = lambda loops=loops: loops, few
            gradient = jax.jit(lambda *given, loss=loss: jax.grad(loss, (0, 1))(*given))
            programs[arm] = gradient.lower(experts, x).compile()
            jax.block_until_ready(programs[arm](experts, x))
        for _ in range(ROUNDS):
            for arm, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(experts, x))
                seconds[arm].append(time.perf_counter() - start)
        loads = jax.nn.one_hot(routing.experts, NUM_EXPERTS).sum((0, 1))
        print(f"largest load over the mean: {loads.max() / loads.mean():.1f}")
        first = statistics.median(seconds["in a loop"])
        for arm, each in seconds.items():
            middle = statistics.median(each)
            print(f"  {arm}: {1e3 * middle:.0f} ms, {middle / first:.2f}")


if __name__ == "__main__":
    main()
