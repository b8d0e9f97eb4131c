"""The training run: data in, checkpoints and metrics out."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.data import (
    AuxFormat,
    Batch,
    Dataset,
    EvaluationBatch,
    Tokenizer,
    evaluation_batches,
    prepare,
    training_batches,
)
from slam_jax.errors import ConfigError, UserError
from slam_jax.evaluation import evaluate
from slam_jax.runtime import distributed
from slam_jax.runtime.compile_cache import enable_compile_cache
from slam_jax.runtime.lock import lock_workdir
from slam_jax.runtime.memory import explain_out_of_memory
from slam_jax.runtime.signals import Stop, Stopped
from slam_jax.training.checkpoint import CheckpointError, Checkpoints
from slam_jax.training.experiment import Experiment, as_json, flatten
from slam_jax.training.mesh import make_mesh
from slam_jax.training.metrics import MetricsWriter, NoMetrics
from slam_jax.training.optimizer import make_schedule
from slam_jax.training.progress import Progress
from slam_jax.training.sharding import in_force, local_rows, place
from slam_jax.training.start import (
    initial_state,
    require_even,
    require_room_for,
    run_step,
    state_shapes,
)
from slam_jax.training.state import TrainState


class TrainingDiverged(UserError):
    """The loss or its gradient is not finite, step after step."""


def train(
    config: ConfigDict | Mapping[str, Any], workdir: str | Path, stop: Stop | None = None
) -> TrainState:
    """Trains, or goes on where the checkpoints of `workdir` stop; returns the final state.

    config: nested mappings as `default_config` makes them; it is saved with every checkpoint.
    stop: asks the run to save and end early. So does the cluster's notice of preemption, where
    `jax.distributed` is in use.

    Raises:
      ConfigError: a field cannot be built.
      CheckpointError: the workdir has checkpoints of another configuration or none that can be
        read, or a write failed.
      WorkdirError: another run is in the workdir, or it cannot be written to.
      WriteError: a file could not be written.
      TrainingDiverged: `run.max_bad_steps` steps in a row were not finite, and again as many after
        going back to the last checkpoint.
      OutOfMemory: the state, a batch or one of an evaluation does not fit.
      Stopped: the run was asked to stop and its last step is saved.
    """
    enable_compile_cache()
    config = as_json(config)
    experiment = Experiment.from_config(config)
    run, mesh = experiment.run, make_mesh(experiment.mesh)
    require_even(experiment, mesh)
    with (
        lock_workdir(workdir) if distributed.is_first_process() else contextlib.nullcontext(),
        Checkpoints(workdir, keep_every=run.keep_every) as checkpoints,
        in_force(mesh),
        distributed.explain_lost_peers(),
    ):
        notes: list[str] = []
        latest = checkpoints.recover(notes.append)
        if latest is not None:
            _require_same(checkpoints.read_config(latest), config, Path(workdir))
        dataset = prepare(experiment.data, model=experiment.model)
        _require_views(run.evaluate_views, dataset)
        if latest is not None:
            tokenizer = Tokenizer.from_json(checkpoints.read_tokenizer(latest))
            if dataset.corpus_is_whole:
                _require_same_tokenizer(tokenizer, dataset.tokenizer, Path(workdir))
            _require_same_aux(checkpoints.read_aux(latest), dataset.aux_format, Path(workdir))
            if dataset.tokenizer != tokenizer:
                dataset = prepare(experiment.data, tokenizer, model=experiment.model)
        vocab_size = dataset.tokenizer.vocab_size
        with explain_out_of_memory(
            "the training state", "choose smaller sizes or a larger machine"
        ):
            if latest is None:
                graphdef, state = initial_state(experiment, vocab_size, mesh)
            else:
                graphdef, like = state_shapes(experiment, vocab_size, mesh)
                require_room_for(like, mesh)
                state = checkpoints.restore(latest, like)
        first = int(state.step)
        # A run that was stopped in an evaluation saved the step without it.
        owed = first > 0 and run.evaluates(first) and not checkpoints.read_metrics(first)
        board = run.tensorboard
        with (
            MetricsWriter(workdir, first, evaluated=not owed, tensorboard=board)
            if distributed.is_first_process()
            else NoMetrics() as writer,
            Progress(
                run.num_steps, first_step=first, shown=distributed.is_first_process()
            ) as progress,
        ):
            for note in notes:
                progress.log(note)
            if first == run.num_steps and not owed:
                progress.log(f"{workdir} is already at its last step, {first:,}")
                return state
            count = sum(x.size for x in jax.tree.leaves(state.params))
            start = f"from step {first:,} of {workdir}" if first else f"in {workdir}"
            progress.log(f"{count:,} parameters on {_where(mesh)}, {start}")
            stop = stop or Stop()
            trainer = _Run(
                experiment, config, graphdef, dataset, checkpoints, writer, progress, stop, mesh
            )
            with explain_out_of_memory("a step", _SMALLER_STEPS):
                return trainer(state, owed)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run works with; called with the state it starts from, it returns the final one."""

    experiment: Experiment
    config: dict[str, Any]
    graphdef: nnx.GraphDef
    dataset: Dataset
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    stop: Stop
    mesh: Mesh | None
    sync_points: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    def __call__(self, state: TrainState, owed: bool) -> TrainState:
        """owed: the evaluation of the first step is still to be done."""
        run, dataset = self.experiment.run, self.dataset
        step_fn = run_step(self.experiment, self.graphdef, state, self.mesh)
        first = int(state.step)
        data = self.experiment.data
        batches = training_batches(
            dataset.train,
            dataset.tokenizer,
            data,
            start_step=first,
            rows=local_rows(data.batch_size, self.mesh),
        )
        pending = None
        if owed:
            self._save(first, state, self._evaluate(first, state))
        for step in range(first + 1, run.num_steps + 1):
            self.checkpoints.poll()
            view, batch = next(batches)
            state, metrics = step_fn(state, place(batch, self.mesh, data.batch_size))
            self.stop.expect_save()
            # The device works on this step while the host reads the one before.
            bad_steps = {} if pending is None else {step - 1: self._report(*pending)}
            pending = (step, view, batch, metrics)
            stops = self._asked()
            if stops or run.evaluates(step) or run.saves(step):
                bad_steps[step] = self._report(*pending)
                pending = None
            for at, count in bad_steps.items():
                if count and count % run.max_bad_steps == 0:
                    state = self._go_back(at, state, count)
                    pending = None
            scores = None
            if run.evaluates(step) and not stops:
                scores = self._evaluate(step, state)
                stops = scores is None
            if stops or run.evaluates(step) or run.saves(step):
                self._save(step, state, scores)
            if stops:
                self.checkpoints.wait()
                raise Stopped(f"step {step:,} is saved; the same command goes on from there")
        return state

    def _asked(self) -> bool:
        """Whether to stop; called after every step and before every batch of an evaluation. Of
        several processes each calls it as often as the others, and all are told in the same call.
        """
        if multihost_utils.reached_preemption_sync_point(next(self.sync_points)):
            self.stop.request()
        return self.stop.requested

    def _report(self, step: int, view: str, batch: Batch, metrics: Any) -> int:
        """Shows and writes a step; returns how many steps in a row were skipped."""
        values = jax.device_get(metrics)
        # Of several processes this one has some of the rows, about as long as those of the others.
        examples = self.experiment.data.batch_size
        self.progress.update(
            step,
            loss=float(values.loss.total),
            examples=examples,
            tokens=round(np.sum(batch.length) * examples / len(batch.tokens)),
            view=view,
        )
        if values.bad_steps:
            skipped = f"step {step:,} ({view}): loss or gradient is not finite, step skipped"
            self.progress.log(skipped)
        if step % self.experiment.run.log_every == 0:
            parts = {name: float(value) for name, value in values.loss._asdict().items()}
            schedule = make_schedule(self.experiment.optimizer, self.experiment.run.num_steps)
            rate = np.asarray(schedule(values.updates)).item()
            more = {"grad_norm": float(values.grad_norm), "learning_rate": rate, "view": view}
            self.writer.write(step, "train", parts | more)
        return int(values.bad_steps)

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float] | None:
        """Scores on the validation split; None if a stop cut it short. Where it fails, the step is
        saved without."""
        try:
            with explain_out_of_memory("an evaluation", _SMALLER_EVALUATIONS):
                scores = validate(self.experiment, self.graphdef, state, self.dataset, self._asked)
        except _CutShort:
            return None
        except Exception:
            # It takes all processes to save, and this may be the only one that fails.
            if jax.process_count() == 1:
                self._save(step, state, None)
            raise
        self.writer.write(step, "validation", scores)
        self.progress.log(_summary(step, scores))
        return scores

    def _save(self, step: int, state: TrainState, scores: Mapping[str, float] | None) -> None:
        self.writer.sync()
        dataset = self.dataset
        self.checkpoints.save(
            step,
            state,
            config=self.config,
            tokenizer=dataset.tokenizer.to_json(),
            aux=None if dataset.aux_format is None else dataset.aux_format.to_json(),
            metrics=scores or {},
        )

    def _go_back(self, step: int, state: TrainState, bad_steps: int) -> TrainState:
        """The state of the last checkpoint before the batches that were not finite, and past them;
        once. step: the last of these. state: is no longer there afterwards.

        Raises TrainingDiverged the second time, or where there is no checkpoint.
        """
        self.checkpoints.wait()
        last = self.checkpoints.recover(self.progress.log, until=step - bad_steps)
        text = f"step {step:,}: loss or gradient has not been finite for {bad_steps} steps"
        if last is None or bad_steps > self.experiment.run.max_bad_steps:
            tried = "" if last is None else f", also not from the checkpoint of step {last:,}"
            raise TrainingDiverged(
                f"{text}{tried}; lower optimizer.learning_rate, set optimizer.clip_norm, or look "
                f"at the batches of steps {step - bad_steps + 1:,} to {step:,}"
            )
        self.progress.log(f"{text}; going on with the parameters of step {last:,}")
        # There may be no room for two.
        for x in jax.tree.leaves((state.params, state.opt_state, state.ema)):
            x.delete()
        with explain_out_of_memory("the training state", "go on on a larger machine"):
            restored = self.checkpoints.restore(last, state)
        return dataclasses.replace(
            restored, step=state.step, skipped=state.skipped, bad_steps=state.bad_steps
        )


class _CutShort(Exception):
    """An evaluation saw the request to stop."""


_SMALLER_STEPS = (
    "lower data.batch_size, or raise optimizer.accumulate_steps, which takes a batch in parts"
)
_SMALLER_EVALUATIONS = (
    "go on on a larger machine or mesh, or start over with more optimizer.accumulate_steps: its "
    "batches are as large as the parts that a step takes"
)


def validate(
    experiment: Experiment,
    graphdef: nnx.GraphDef,
    state: TrainState,
    dataset: Dataset,
    asked: Callable[[], bool],
) -> dict[str, float]:
    """Accuracy of generated answers on the validation split: "view/kind", and "accuracy", their
    mean, by which the best checkpoint is chosen.

    asked: before each batch, whether to stop; then _CutShort is raised.
    """
    run, data, parts = experiment.run, experiment.data, experiment.optimizer.accumulate_steps
    size, count = data.batch_size // parts, run.evaluate_batches and run.evaluate_batches * parts

    def batches(view: str) -> Iterator[EvaluationBatch]:
        made = evaluation_batches(dataset.validation, dataset.tokenizer, view, size, seed=data.seed)
        for batch in itertools.islice(made, count):
            if asked():
                raise _CutShort
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


def _summary(step: int, scores: Mapping[str, float]) -> str:
    rows = [f"{name} {100 * value:.1f}" for name, value in scores.items() if name != "accuracy"]
    return f"step {step:,} · validation {100 * scores['accuracy']:.1f} % · " + " · ".join(rows)


def _require_views(views: Sequence[str], dataset: Dataset) -> None:
    for view in views:
        if view not in dataset.validation.views:
            known = ", ".join(dataset.validation.views)
            raise ConfigError(f"run.evaluate_views has {view!r}, and the data set has {known}")


def _where(mesh: Mesh | None) -> str:
    if mesh is None:
        return str(jax.devices()[0])
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)


# What is computed depends on none of these.
_MAY_CHANGE = (
    *("data.data_dir", "data.path", "model.remat"),
    *("run.keep_every", "run.log_every", "run.tensorboard"),
)


def _require_same(saved: Mapping[str, Any], config: Mapping[str, Any], workdir: Path) -> None:
    """A run goes on only as what it was, though on any devices, from wherever its data now lies."""
    was, now = flatten(saved), flatten(config)
    for name in sorted(was.keys() | now.keys()):
        free = name in _MAY_CHANGE or name.startswith("mesh.")
        if was.get(name) != now.get(name) and not free:
            raise CheckpointError(
                f"{workdir} holds a run with {name}={was.get(name)!r} and this one has "
                f"{name}={now.get(name)!r}; use another workdir or the same configuration"
            )


def _require_same_tokenizer(saved: Tokenizer, ours: Tokenizer, workdir: Path) -> None:
    """Token ids mean what they meant only while the data are what they were."""
    if saved.sha256 != ours.sha256:
        raise CheckpointError(
            f"{workdir} holds a run with a tokenizer of sha256 {saved.sha256[:12]} and that of the "
            f"data is now {ours.sha256[:12]}: the data set has changed; put the old one back, or "
            "use another workdir"
        )


def _require_same_aux(saved: Any, ours: AuxFormat | None, workdir: Path) -> None:
    """Numbers mean what they meant only while they are standardised as they were."""
    if saved is not None and (ours is None or saved != ours.to_json()):
        raise CheckpointError(
            f"{workdir} holds a run with other columns of numbers, or other numbers in them: the "
            "data set has changed; put the old one back, or use another workdir"
        )
