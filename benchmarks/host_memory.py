"""What `tune_host` gains on a CPU: the gradient of a gated MLP with and without it.

    python benchmarks/host_memory.py

Each arm is a process of its own, since memory settings last as long as their process; arms
alternate, and the last line is the ratio of the medians.
"""

import statistics
import subprocess
import sys
import time

ROUNDS, REPEATS = 5, 20


def measure(tuned: bool) -> float:
    """Seconds of one gradient, the median of REPEATS."""
    import jax
    from flax import nnx

    from slam_jax.layers import GatedMLP
    from slam_jax.training.host import tune_host

    if tuned:
        tune_host()
    mlp = GatedMLP(96, 256, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (8_960, 96))
    gradient = jax.jit(jax.grad(lambda mlp, x: (mlp(x) ** 2).sum(), argnums=(0, 1)))
    jax.block_until_ready(gradient(mlp, x))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(gradient(mlp, x))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    arms = {"plain": [], "tuned": []}
    for _ in range(ROUNDS):
        for arm, seconds in arms.items():
            out = subprocess.run([sys.executable, __file__, arm], capture_output=True, check=True)
            seconds.append(float(out.stdout))
    for arm, seconds in arms.items():
        middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{arm}: {1e3 * middle:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})")
    ratio = statistics.median(arms["tuned"]) / statistics.median(arms["plain"])
    print(f"tuned / plain: {ratio:.2f}")


if __name__ == "__main__":
    print(measure(sys.argv[1] == "tuned")) if sys.argv[1:] else main()
