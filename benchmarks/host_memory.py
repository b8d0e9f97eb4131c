"""What `tune_host` gains on a CPU: a training step of `standard`, as `heldout` has it, with and
without it.

    python benchmarks/host_memory.py

Each arm is a process of its own, since memory settings last as long as their process; arms
alternate, and the last line is the ratio of the medians.
"""

import statistics
import subprocess
import sys

ROUNDS, REPEATS = 5, 8


def measure(tuned: bool) -> float:
    """Seconds of one step, the median of REPEATS."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from slam_jax.language_models import make_model
    from slam_jax.rocket.heldout.measure import HeldoutSettings
    from slam_jax.rocket.timing import timed
    from slam_jax.training.host import tune_host
    from slam_jax.training.losses import language_model_loss
    from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
    from slam_jax.training.state import init_state, make_train_step, split_model

    if tuned:
        tune_host()
    settings = HeldoutSettings()
    config = settings.config_of("standard", settings.vocab_size)
    graphdef, params = split_model(make_model(config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(OptimizerConfig(), 1_000)
    state = init_state(params, optimizer, jax.random.key(0), ema=False)
    step = jax.jit(make_train_step(graphdef, language_model_loss, optimizer), donate_argnums=0)
    tokens = jnp.arange(settings.batch_size * (settings.length + 1)) % settings.vocab_size
    batch = tokens.reshape(settings.batch_size, -1)

    def one_more():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return statistics.median(timed(one_more, REPEATS))


def main() -> None:
    arms = {"plain": [], "tuned": []}
    for _ in range(ROUNDS):
        for arm, seconds in arms.items():
            out = subprocess.run([sys.executable, __file__, arm], capture_output=True, check=True)
            seconds.append(float(out.stdout))
    for arm, seconds in arms.items():
        middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"{arm}: {1e3 * middle:.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f})")
    ratio = statistics.median(arms["tuned"]) / statistics.median(arms["plain"])
    print(f"tuned / plain: {ratio:.2f}")


if __name__ == "__main__":
    print(measure(sys.argv[1] == "tuned")) if sys.argv[1:] else main()
