"""Evaluation of a checkpoint on the test split, from what stands beside it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from slam_jax.data import EvaluationBatch, Example, evaluation_batches, prepare
from slam_jax.data.views import with_halves
from slam_jax.errors import ConfigError
from slam_jax.evaluation.answers import Results, evaluate
from slam_jax.evaluation.table import write_metrics
from slam_jax.reporting.report import choose_examples, write_report
from slam_jax.runtime.compile_cache import enable_compile_cache
from slam_jax.training import Experiment, load, override, split_model
from slam_jax.training.checkpoint import Step
from slam_jax.training.metrics import read_metrics

_EXAMPLES = 24


def evaluate_checkpoint(
    workdir: str | Path, step: Step = None, overrides: Sequence[str] = ()
) -> Results:
    """The mixes that the run was trained on, on the test split; writes `metrics.json` and
    `report.html` into `WORKDIR/eval`.

    step: a number, "best" or "latest"; None = best. overrides: `--config.data.field=value`
    arguments that change where the data is and how it is read; the rest is the checkpoint's.

    Raises:
      CheckpointError, ConfigError: what cannot be read or built, in one line.
    """
    enable_compile_cache()
    loaded = load(workdir, step)
    config = override(loaded.config, overrides)
    for group in config:
        if group != "data" and config[group] != loaded.config[group]:
            raise ConfigError(
                f"config.{group} is part of the checkpoint; an evaluation changes config.data alone"
            )
    data = Experiment.from_config(config).data
    dataset = prepare(
        data, loaded.tokenizer, aux_format=loaded.aux_format, model=loaded.model.config
    )
    views = data.views
    if data.drop_inputs:  # it has seen every mix
        views = (*views, *(view for view in dataset.test.views if view not in views))
    graphdef, params = split_model(loaded.model)
    batches = {
        view: evaluation_batches(
            dataset.test, loaded.tokenizer, view, data.batch_size, seed=data.seed
        )
        for view in with_halves(views)
    }
    started, shown = time.monotonic(), {}
    results = evaluate(
        graphdef,
        params,
        {view: _keep_first(made, shown.setdefault(view, [])) for view, made in batches.items()},
        loaded.tokenizer,
        step=loaded.step,
        max_new_tokens=dataset.test.answer_length(loaded.tokenizer) + 1,
    )
    seconds = time.monotonic() - started
    folder = Path(workdir) / "eval"
    write_metrics(folder / "metrics.json", results.metrics)
    write_report(
        folder / "report.html",
        loaded,
        results,
        choose_examples(results, {view: shown[view] for view in views}),
        read_metrics(workdir),
        title=Path(workdir).absolute().name,
        seconds=seconds,
    )
    return results


def _keep_first(
    batches: Iterable[EvaluationBatch], kept: list[Example]
) -> Iterator[EvaluationBatch]:
    """The batches, of whose examples the first are kept for the report."""
    for batch in batches:
        kept += batch.examples[: _EXAMPLES - len(kept)]
        yield batch
