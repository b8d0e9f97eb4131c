"""What `tune_host` gains on a CPU: a training step of `standard`, as `heldout` has it, and one of
the quickstart; without it, with the holes that a compilation leaves, and with all of it.

    python benchmarks/host_memory.py

Each arm is a process of its own, since memory settings last as long as their process, and compiles
its programs itself; arms alternate, and ratios are those of the medians.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slam_jax.heap import one_heap

ROUNDS, REPEATS = 3, 20
CONFIG = Path(__file__).parents[1] / "configs" / "slam_v3_quickstart.py"
ARMS = ("plain", "holes", "tuned")


def measure(subject: str, arm: str) -> float:
    """Seconds of one step, the median of REPEATS."""
    if arm != "plain":
        one_heap()  # as every entry point does
    import jax

    from slam_jax.rocket.timing import timed
    from slam_jax.training import host

    if arm == "holes":
        host.plug_holes = lambda: None
    if arm != "plain":
        host.tune_host()
    jax.config.update("jax_enable_compilation_cache", False)
    step, state, batch = SUBJECTS[subject]()

    def one_more():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return statistics.median(timed(one_more, REPEATS))


def standard() -> tuple[Callable, Any, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from slam_jax.language_models import make_model
    from slam_jax.rocket.heldout.measure import HeldoutSettings
    from slam_jax.training.losses import language_model_loss
    from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
    from slam_jax.training.state import init_state, make_train_step, split_model

    settings = HeldoutSettings()
    config = settings.config_of("standard", settings.vocab_size)
    graphdef, params = split_model(make_model(config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(OptimizerConfig(), 1_000)
    state = init_state(params, optimizer, jax.random.key(0), ema=False)
    step = jax.jit(make_train_step(graphdef, language_model_loss, optimizer), donate_argnums=0)
    tokens = jnp.arange(settings.batch_size * (settings.length + 1)) % settings.vocab_size
    return step, state, tokens.reshape(settings.batch_size, -1)


def quickstart() -> tuple[Callable, Any, Any]:
    from slam_jax.data import prepare, training_batches
    from slam_jax.training import Experiment, read_config
    from slam_jax.training.start import initial_state, run_step

    experiment = Experiment.from_config(read_config(CONFIG))
    dataset = prepare(experiment.data, model=experiment.model)
    graphdef, state = initial_state(experiment, dataset.tokenizer.vocab_size)
    _, batch = next(training_batches(dataset.train, dataset.tokenizer, experiment.data))
    return run_step(experiment, graphdef, state), state, batch


SUBJECTS = {"standard": standard, "quickstart": quickstart}


def main() -> None:
    for subject in SUBJECTS:
        seconds = {arm: [] for arm in ARMS}
        for _ in range(ROUNDS):
            for arm in ARMS:
                command = [sys.executable, __file__, subject, arm]
                out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                seconds[arm].append(float(out.split()[-1]))
        plain = statistics.median(seconds["plain"])
        for arm, each in seconds.items():
            middle, low, high = statistics.median(each), min(each), max(each)
            spread = f"({1e3 * low:.0f} to {1e3 * high:.0f})"
            print(f"{subject}, {arm}: {1e3 * middle:.0f} ms {spread}, {middle / plain:.2f}")


if __name__ == "__main__":
    print(measure(*sys.argv[1:])) if sys.argv[1:] else main()
