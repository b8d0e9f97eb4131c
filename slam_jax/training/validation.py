"""Evaluations during training, on the validation split."""

import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from flax import nnx

from slam_jax.data import Dataset, EvaluationBatch, evaluation_batches
from slam_jax.evaluation import evaluate
from slam_jax.runtime.signals import Stopped
from slam_jax.training.experiment import Experiment
from slam_jax.training.state import TrainState


def validate(
    experiment: Experiment,
    graphdef: nnx.GraphDef,
    state: TrainState,
    dataset: Dataset,
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """The accuracy of generated answers: "view/kind", and as "accuracy" their mean, by which the
    best checkpoint is chosen.

    should_stop: called before each batch; where it returns True, `Stopped` is raised.
    """
    run, data, parts = experiment.run, experiment.data, experiment.optimizer.accumulate_steps
    size, count = data.batch_size // parts, run.evaluate_batches and run.evaluate_batches * parts

    def batches(view: str) -> Iterator[EvaluationBatch]:
        all_batches = evaluation_batches(
            dataset.validation, dataset.tokenizer, view, size, seed=data.seed
        )
        for batch in itertools.islice(all_batches, count):
            if should_stop():
                raise Stopped
            yield batch

    views = run.evaluate_views or data.views
    results = evaluate(
        graphdef,
        nnx.State(state.best_params),
        {view: batches(view) for view in views},
        dataset.tokenizer,
        step=int(state.step),
        max_new_tokens=dataset.validation.answer_length(dataset.tokenizer) + 1,
    )
    scores = {
        f"{view}/{kind}": results.metrics["views"][view][kind]["accuracy"]
        for view in views
        for kind in results.metrics["views"].get(view, ())
        if not kind.startswith("needs_both")
    }
    return {"accuracy": float(np.mean(list(scores.values()))), **scores}


def summarize(step: int, scores: Mapping[str, float]) -> str:
    """The scores of `validate` in one line, in percent."""
    rows = [f"{name} {100 * value:.1f}" for name, value in scores.items() if name != "accuracy"]
    return f"step {step:,} · validation {100 * scores['accuracy']:.1f} % · " + " · ".join(rows)
