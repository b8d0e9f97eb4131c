"""Evaluation of a checkpoint on the test split, from what stands beside it."""

from collections.abc import Sequence
from pathlib import Path

from slam_jax.data import evaluation_batches, prepare
from slam_jax.data.views import with_halves
from slam_jax.errors import ConfigError
from slam_jax.evaluation.answers import Results, evaluate
from slam_jax.evaluation.table import write_metrics
from slam_jax.training import Experiment, load, override, split_model
from slam_jax.training.checkpoint import Step


def evaluate_checkpoint(
    workdir: str | Path, step: Step = None, overrides: Sequence[str] = ()
) -> Results:
    """The views that the run was trained on, on the test split; writes `WORKDIR/eval/metrics.json`.

    step: a number, "best" or "latest"; None = best. overrides: `--config.data.field=value`
    arguments that change where the data is and how it is read; the rest is the checkpoint's.

    Raises:
      CheckpointError, ConfigError: what cannot be read or built, in one line.
    """
    loaded = load(workdir, step)
    config = override(loaded.config, overrides)
    for group in config:
        if group != "data" and config[group] != loaded.config[group]:
            raise ConfigError(
                f"config.{group} is part of the checkpoint; an evaluation changes config.data alone"
            )
    data = Experiment.from_config(config).data
    dataset = prepare(data, loaded.tokenizer, model=loaded.model.config)
    graphdef, params = split_model(loaded.model)
    batches = {
        view: evaluation_batches(
            dataset.test, loaded.tokenizer, view, data.batch_size, seed=data.seed
        )
        for view in with_halves(data.views)
    }
    results = evaluate(
        graphdef,
        params,
        batches,
        loaded.tokenizer,
        step=loaded.step,
        max_new_tokens=dataset.test.answer_length(loaded.tokenizer) + 1,
    )
    write_metrics(Path(workdir) / "eval" / "metrics.json", results.metrics)
    return results
