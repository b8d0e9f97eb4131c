"""Batches from the pipeline alone against the training steps that take them, in the quickstart.

The mix is that of its last stage, with everything in it. Figures are seconds for so many steps, so
that a ratio of 3 means a pipeline that could feed three such hosts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import Arm, Comparison

_CONFIG = Path(__file__).parents[1] / "configs" / "slam_v3_quickstart.py"
_SKIPPED = 8  # batches that were made ahead, before anybody asked


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    count = 4 if quick else 48
    given = {"count": count, "data_dir": str(Path(folder) / "data"), "quick": quick}
    yield Comparison(
        f"quickstart, {count} steps",
        [
            Arm("the pipeline alone", batches, given),
            Arm("training steps", steps, given, aim=3.0),
        ],
        tolerance=0.0,
        repeats=1,
    )


def batches(count: int, data_dir: str, quick: bool) -> Any:
    """How many examples came."""
    import itertools

    _, _, made = _prepared(data_dir, quick)
    for _ in range(_SKIPPED):
        next(made)
    return lambda: sum(len(batch.tokens) for _, batch in itertools.islice(made, count))


def steps(count: int, data_dir: str, quick: bool) -> Any:
    """The same, each batch trained on; batches are made beforehand."""
    import jax

    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.training.slam_v3_task import SlamV3Task
    from slam_jax.training.start import initial_state, jit_step

    enable_compile_cache()
    experiment, dataset, made = _prepared(data_dir, quick)
    graphdef, state = initial_state(SlamV3Task(experiment), dataset.tokenizer.vocab_size)
    step = jit_step(SlamV3Task(experiment), graphdef, state)
    kept = [next(made)[1] for _ in range(count)]

    def call():
        nonlocal state
        for batch in kept:
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        return np.array(sum(len(batch.tokens) for batch in kept))

    return call


def _prepared(data_dir: str, quick: bool) -> Any:
    from slam_jax.data import prepare, training_batches
    from slam_jax.training import Experiment, read_config

    config = read_config(_CONFIG)
    config["data"]["data_dir"] = data_dir
    first = config["data"]["stages"][-1][0]
    if quick:
        first, config["data"]["stages"] = 0, [[0, {"aux": 1.0}]]
    experiment = Experiment.from_config(config)
    dataset = prepare(experiment.data, model=experiment.model)
    made = training_batches(dataset.train, dataset.tokenizer, experiment.data, start_step=first)
    return experiment, dataset, made
