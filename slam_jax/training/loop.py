"""The training run: data in, checkpoints and metrics out."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from slam_jax.data import (
    Batch,
    Dataset,
    Tokenizer,
    evaluation_batches,
    prepare,
    training_batches,
)
from slam_jax.errors import UserError
from slam_jax.evaluation import evaluate
from slam_jax.slam_v3 import SlamV3
from slam_jax.training.checkpoint import CheckpointError, Checkpoints
from slam_jax.training.experiment import Experiment, as_json, flatten
from slam_jax.training.host import tune_host
from slam_jax.training.lock import only_run_in
from slam_jax.training.losses import slam_v3_loss
from slam_jax.training.metrics import MetricsWriter
from slam_jax.training.optimizer import make_optimizer, make_schedule
from slam_jax.training.progress import Progress
from slam_jax.training.state import TrainState, init_state, make_train_step, split_model


class TrainingDiverged(UserError):
    """The loss or its gradient is not finite, step after step."""


def train(config: ConfigDict | Mapping[str, Any], workdir: str | Path) -> TrainState:
    """Trains, or goes on where the checkpoints of `workdir` stop; returns the final state.

    config: nested mappings as `default_config` makes them; it is saved with every checkpoint.

    Raises:
      ConfigError: a field cannot be built.
      CheckpointError: the workdir has checkpoints of another configuration or none that can be
        read, or a write failed.
      WorkdirError: another run is in the workdir, or it cannot be written to.
      TrainingDiverged: `run.max_bad_steps` steps in a row were not finite, and again as many after
        going back to the last checkpoint.
    """
    tune_host()
    config = as_json(config)
    experiment = Experiment.from_config(config)
    run = experiment.run
    with only_run_in(workdir), Checkpoints(workdir, keep_every=run.keep_every) as checkpoints:
        notes: list[str] = []
        latest = checkpoints.recover(notes.append)
        tokenizer = None
        if latest is not None:
            _require_same(checkpoints.read_config(latest), config, Path(workdir))
            tokenizer = Tokenizer.from_json(checkpoints.read_tokenizer(latest))
        dataset = prepare(experiment.data, tokenizer)
        graphdef, state = initial_state(experiment, dataset.tokenizer.vocab_size)
        if latest is not None:
            state = checkpoints.restore(latest, state)
        first = int(state.step)
        with (
            MetricsWriter(workdir, resume_step=first, tensorboard=run.tensorboard) as writer,
            Progress(run.num_steps, first_step=first) as progress,
        ):
            for note in notes:
                progress.log(note)
            if first == run.num_steps:
                progress.log(f"{workdir} is already at its last step, {first:,}")
                return state
            count = sum(x.size for x in jax.tree.leaves(state.params))
            start = f"from step {first:,} of {workdir}" if first else f"in {workdir}"
            progress.log(f"{count:,} parameters on {jax.devices()[0]}, {start}")
            return _run(experiment, config, graphdef, state, dataset, checkpoints, writer, progress)


def initial_state(experiment: Experiment, vocab_size: int) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of the model and the state before the first step."""
    init_key, run_key = jax.random.split(jax.random.key(experiment.seed))
    model_config = experiment.with_vocabulary(vocab_size)
    # Compiled as one program: each of a hundred small initialisers costs more alone.
    model = jax.jit(lambda key: SlamV3(model_config, rngs=nnx.Rngs(key)))(init_key)
    graphdef, params = split_model(model)
    optimizer = make_optimizer(experiment.optimizer, experiment.run.num_steps)
    ema = experiment.optimizer.ema_decay is not None
    return graphdef, init_state(params, optimizer, run_key, ema=ema)


def _run(experiment, config, graphdef, state, dataset, checkpoints, writer, progress) -> TrainState:
    run, options = experiment.run, experiment.optimizer
    step_fn = make_train_step(
        graphdef,
        functools.partial(slam_v3_loss, config=experiment.loss),
        make_optimizer(options, run.num_steps),
        ema_decay=options.ema_decay,
        accumulate_steps=options.accumulate_steps,
    )
    step_fn = jax.jit(step_fn, donate_argnums=0)
    schedule = make_schedule(options, run.num_steps)
    first = int(state.step)
    batches = training_batches(dataset.train, dataset.tokenizer, experiment.data, start_step=first)
    pending = None

    def report(step: int, view: str, batch: Batch, metrics: Any) -> int:
        """Shows and writes a step; returns how many steps in a row were skipped."""
        values = jax.device_get(metrics)
        progress.update(
            step,
            loss=float(values.loss.total),
            examples=len(batch.tokens),
            tokens=int(np.sum(batch.length)),
            view=view,
        )
        if values.bad_steps:
            progress.log(f"step {step:,} ({view}): loss or gradient is not finite, step skipped")
        if step % run.log_every == 0:
            parts = {name: float(value) for name, value in values.loss._asdict().items()}
            rate = np.asarray(schedule(step - 1)).item()
            more = {"grad_norm": float(values.grad_norm), "learning_rate": rate, "view": view}
            writer.write(step, "train", parts | more)
        return int(values.bad_steps)

    def save(step: int, metrics: Mapping[str, float]) -> None:
        tokenizer = dataset.tokenizer.to_json()
        checkpoints.save(step, state, config=config, tokenizer=tokenizer, metrics=metrics)

    for step in range(first + 1, run.num_steps + 1):
        checkpoints.poll()
        view, batch = next(batches)
        state, metrics = step_fn(state, batch)
        # The device works on this step while the host reads the one before.
        bad_steps = [] if pending is None else [report(*pending)]
        pending = (step, view, batch, metrics)
        evaluates = step % run.evaluate_every == 0 or step == run.num_steps
        saves = evaluates or (run.save_every is not None and step % run.save_every == 0)
        if saves:
            bad_steps.append(report(*pending))
            pending = None
        for count in bad_steps:
            if count and count % run.max_bad_steps == 0:
                state = _go_back(state, step, count, checkpoints, run, progress)
                pending = None
        if evaluates:
            scores = validate(experiment, graphdef, state, dataset)
            writer.write(step, "validation", scores)
            progress.log(_summary(step, scores))
            save(step, scores)
        elif saves:
            save(step, {})
    return state


def _go_back(state, step, bad_steps, checkpoints, run, progress) -> TrainState:
    """The state of the last checkpoint, past the batches that were not finite; once.

    Raises TrainingDiverged the second time, or where there is no checkpoint.
    """
    checkpoints.wait()
    last = checkpoints.recover(progress.log)
    text = f"step {step:,}: loss or gradient has not been finite for {bad_steps} steps"
    if last is None or bad_steps > run.max_bad_steps:
        tried = "" if last is None else f", also not from the checkpoint of step {last:,}"
        raise TrainingDiverged(
            f"{text}{tried}; lower optimizer.learning_rate, set optimizer.clip_norm, or look at "
            f"the batches of steps {step - bad_steps + 1:,} to {step:,}"
        )
    progress.log(f"{text}; going on with the parameters of step {last:,}")
    restored = checkpoints.restore(last, state)
    return dataclasses.replace(
        restored, step=state.step, skipped=state.skipped, bad_steps=state.bad_steps
    )


def validate(
    experiment: Experiment, graphdef: nnx.GraphDef, state: TrainState, dataset: Dataset
) -> dict[str, float]:
    """Accuracy of generated answers on the validation split: "view/kind", and "accuracy", their
    mean, by which the best checkpoint is chosen."""
    run, data = experiment.run, experiment.data

    def batches(view: str):
        made = evaluation_batches(
            dataset.validation, dataset.tokenizer, view, data.batch_size, seed=data.seed
        )
        return itertools.islice(made, run.evaluate_batches)

    views = run.evaluate_views or data.views
    results = evaluate(
        graphdef,
        nnx.State(state.best_params),
        {view: batches(view) for view in views},
        dataset.tokenizer,
        step=int(state.step),
    )
    scores = {
        f"{view}/{kind}": results.metrics["views"][view][kind]["accuracy"]
        for view in views
        for kind in results.metrics["views"][view]
        if not kind.startswith("needs_both")
    }
    return {"accuracy": float(np.mean(list(scores.values()))), **scores}


def _summary(step: int, scores: Mapping[str, float]) -> str:
    rows = [f"{name} {100 * value:.1f}" for name, value in scores.items() if name != "accuracy"]
    return f"step {step:,} · validation {100 * scores['accuracy']:.1f} % · " + " · ".join(rows)


def _require_same(saved: Mapping[str, Any], config: Mapping[str, Any], workdir: Path) -> None:
    """A run goes on only as what it was."""
    was, now = flatten(saved), flatten(config)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise CheckpointError(
                f"{workdir} holds a run with {name}={was.get(name)!r} and this one has "
                f"{name}={now.get(name)!r}; use another workdir or the same configuration"
            )
