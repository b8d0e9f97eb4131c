"""What checkpoints cost a run: the quickstart's step with one checkpoint a minute and with none.

    python benchmarks/checkpoint_cost.py

Arms alternate, a minute each, in one process; the order is reversed every time. The same number of
steps is timed in both, to the end of the write where there is one.
"""

import functools
import itertools
import runpy
import statistics
import tempfile
import time
from pathlib import Path

import jax

from slam_jax.data import prepare, training_batches
from slam_jax.runtime.compile_cache import enable_compile_cache
from slam_jax.training import Checkpoints, Experiment, make_optimizer, make_train_step, slam_v3_loss
from slam_jax.training.checkpoint.trees import num_bytes
from slam_jax.training.experiment import as_json
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import initial_state

ROUNDS, SEGMENT_S = 5, 60
CONFIG = Path(__file__).parents[1] / "configs" / "slam_v3_quickstart.py"


def main() -> None:
    enable_compile_cache()
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.data.stages = ((0, {"image": 1.0}),)
    experiment = Experiment.from_config(config)
    dataset = prepare(experiment.data)
    graphdef, state = initial_state(SlamV3Task(experiment), dataset.tokenizer.vocab_size)
    step_fn = jax.jit(
        make_train_step(
            graphdef,
            functools.partial(slam_v3_loss, config=experiment.loss),
            make_optimizer(experiment.optimizer, experiment.run.num_steps),
        ),
        donate_argnums=0,
    )
    batches = training_batches(dataset.train, dataset.tokenizer, experiment.data)
    numbers = itertools.count(1)

    def take(count: int) -> None:
        """Takes steps as a run does: each is awaited while the next one is computed."""
        nonlocal state
        pending = None
        for _ in range(count):
            state, metrics = step_fn(state, next(batches)[1])
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
        jax.device_get(pending)

    with tempfile.TemporaryDirectory() as workdir, Checkpoints(workdir) as checkpoints:

        def segment(count: int, saves: bool) -> float:
            start = time.perf_counter()
            take(count // 2)
            if saves:
                checkpoints.save(
                    next(numbers),
                    state,
                    config=as_json(config),
                    tokenizer=dataset.tokenizer.to_json(),
                    metrics={},
                )
            take(count - count // 2)
            checkpoints.wait()
            return time.perf_counter() - start

        segment(20, True)  # compiles
        steps = max(10, round(SEGMENT_S / (segment(100, False) / 100)))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for i in range(ROUNDS):
            for saves in (True, False) if i % 2 else (False, True):
                seconds[saves].append(segment(steps, saves))
        size = sum(path.stat().st_size for path in checkpoints.directory.rglob("*"))
        size /= len(checkpoints.steps())

    print(f"{num_bytes(state) / 2**20:.1f} MiB of state, {size / 2**20:.1f} MiB a checkpoint")
    for saves, name in ((False, "no checkpoint"), (True, "one a minute")):
        middle, low, high = (f(seconds[saves]) for f in (statistics.median, min, max))
        print(f"{steps} steps, {name}: {middle:.2f} s ({low:.2f} to {high:.2f})")
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    low, high = min(ratios), max(ratios)
    print(f"with / without: {statistics.median(ratios):.4f} ({low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
