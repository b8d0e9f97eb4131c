"""The training loop: it reads batches, takes steps, evaluates and saves."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.data.datasets import OWN
from slam_jax.errors import UserError, check_names
from slam_jax.runtime import distributed
from slam_jax.runtime.compile_cache import enable_compile_cache
from slam_jax.runtime.devices import peak_flops
from slam_jax.runtime.lock import lock_workdir
from slam_jax.runtime.memory import explain_out_of_memory
from slam_jax.runtime.signals import Stop, Stopped
from slam_jax.training.base import Bases, records_of, without_bases
from slam_jax.training.changes import changed_at, order_of
from slam_jax.training.checkpoint import Checkpoints, is_loss
from slam_jax.training.experiment import as_json, is_language
from slam_jax.training.kinds import task_of
from slam_jax.training.mesh import make_mesh, name_of
from slam_jax.training.metrics import MetricsWriter
from slam_jax.training.optimizer import make_schedule
from slam_jax.training.profiling import Profile, Profiler
from slam_jax.training.progress import Progress, log_early
from slam_jax.training.resume import OpenedRun, open_run
from slam_jax.training.sharding import local_rows, place, use_mesh
from slam_jax.training.start import compile_step, jit_step
from slam_jax.training.state import StepMetrics, TrainState
from slam_jax.training.task import Task


class Calls(NamedTuple):
    """Functions of the caller; see `train`."""

    on_metrics: Callable[[int, Mapping[str, Any]], Any] | None = None
    on_evaluation: Callable[[int, Mapping[str, float]], Any] | None = None


NO_CALLS = Calls()


class TrainingDiverged(UserError):
    """The loss or its gradient is not finite, step after step."""


def train(
    config: ConfigDict | Mapping[str, Any],
    workdir: str | Path,
    stop: Stop | None = None,
    profile: Profile | None = None,
    base: Sequence[str | Path] = (),
    *,
    dataset: Any = None,
    change: bool = False,
    on_metrics: Callable[[int, Mapping[str, Any]], Any] | None = None,
    on_evaluation: Callable[[int, Mapping[str, float]], Any] | None = None,
) -> TrainState:
    """Trains, or resumes from the checkpoints in `workdir`; returns the final state.

    config: nested mappings as of `default_config`; saved with every checkpoint. stop: asks the run
    to save and end early, as the cluster's preemption notice does under `jax.distributed`. profile:
    the steps of which the first process writes a trace to `workdir/profile`. base: folders in which
    to look first for base weights that the checkpoints name. dataset: in place of what the
    configuration names, such as a `slam_jax.data.Dataset` of own sources. change: a resumed run may
    have other data, and other values of the fields `slam_jax.training.changes.ON_REQUEST`; its
    checkpoints store what was changed at which step. on_metrics, on_evaluation: are called in the
    first process with the step and what is written to the metrics file: of the step, every
    `run.log_every` steps, and of each evaluation.

    Raises:
      ConfigError: a field cannot be built, or the run ends before the steps of the profile do.
      InputError: base weights are missing or were changed.
      CheckpointError: the workdir has checkpoints of another configuration, or none of them can be
        read, or a write failed.
      WorkdirError: another run is in the workdir, or it cannot be written to.
      WriteError: a file could not be written.
      TrainingDiverged: `run.max_bad_steps` steps in a row were not finite, and again as many after
        going back to the last checkpoint.
      OutOfMemory: the state, a step or an evaluation does not fit.
      Stopped: the run was asked to stop and its last step is saved.
    """
    enable_compile_cache()
    config = as_json(config)
    if dataset is not None and not is_language(config):
        config["data"] = {**config.get("data", {}), "name": OWN}
    task, calls = task_of(config), Calls(on_metrics, on_evaluation)
    run, mesh = task.experiment.run, make_mesh(task.experiment.mesh, task.num_processes)
    task.check(mesh)
    if profile is not None:
        profile.check(run.num_steps)
    with contextlib.ExitStack() as stack:
        is_first = distributed.is_first_process()
        checkpoints = _enter(stack, task, workdir, mesh)
        opened = open_run(task, checkpoints, mesh, base, change, dataset, log_early)
        writer = stack.enter_context(_open_writer(opened, workdir, config)) if is_first else None
        first = int(opened.state.step)
        progress = stack.enter_context(
            Progress(run.num_steps, first_step=first, shown=is_first, peak_flops=peak_flops())
        )
        for note in opened.notes:
            progress.log(note)
        if first == run.num_steps and not opened.pending_evaluation:
            progress.log(f"{workdir} is already at its last step, {first:,}")
            return opened.state
        for line in _introduce(opened, mesh, workdir):
            progress.log(line)
        profiler = Profiler(profile if is_first else None, first, workdir, progress)
        tools = checkpoints, writer, progress, stop or Stop(), mesh, stack.enter_context(profiler)
        parts = opened.task, opened.task.stored(config), opened.graphdef, opened.dataset
        more: Any = dict(bases=opened.bases, history=opened.history, calls=calls)
        with explain_out_of_memory("a step", _SMALLER_STEPS):
            state = Trainer(*parts, *tools, **more).run(opened.state, opened.pending_evaluation)
        checkpoints.wait()
        for line in _summary(checkpoints, progress, workdir):
            progress.log(line)
        return state


def _introduce(opened: OpenedRun, mesh: Mesh | None, workdir: str | Path) -> list[str]:
    """The data that the run uses, its parameters and devices, and where it begins."""
    data = opened.task.introduce(opened.dataset)
    return [*data, _describe_start(opened.state, mesh, workdir)]


def _open_writer(opened: OpenedRun, workdir: str | Path, config: dict[str, Any]) -> MetricsWriter:
    run, first = opened.task.experiment.run, int(opened.state.step)
    evaluated = not opened.pending_evaluation
    writer = MetricsWriter(
        workdir, first, evaluated=evaluated, trackers=run.all_trackers, config=config
    )
    writer.write_change(first, changed_at(opened.history, first))
    return writer


def _summary(checkpoints: Checkpoints, progress: Progress, workdir: str | Path) -> list[str]:
    """What a run did, its best score, and where its results are."""
    lines = [f"done: {progress.summary()}"]
    best, metric = checkpoints.best(), checkpoints.best_metric()
    if best is not None:
        score = checkpoints.read_metrics(best)[metric]
        shown = f"{score:.4f}" if is_loss(metric) else f"{100 * score:.1f} %"
        lines.append(f"best: step {best:,}, {metric} {shown}")
    steps = ", ".join(map(str, checkpoints.steps()))
    lines.append(f"checkpoints {steps} and metrics.jsonl are in {workdir}")
    return [*lines, f"next: slam-eval --workdir={workdir}"]


def _enter(
    stack: contextlib.ExitStack, task: Task, workdir: str | Path, mesh: Mesh | None
) -> Checkpoints:
    """Locks the workdir, and enters what the whole run is in; returns the checkpoints."""
    if distributed.is_first_process():
        stack.enter_context(lock_workdir(workdir))
    keep_every = task.experiment.run.keep_every
    checkpoints = stack.enter_context(Checkpoints(workdir, keep_every=keep_every))
    stack.enter_context(use_mesh(mesh))
    stack.enter_context(task.precision())
    stack.enter_context(distributed.explain_lost_peers())
    return checkpoints


def _describe_start(state: TrainState, mesh: Mesh | None, workdir: str | Path) -> str:
    """The number of parameters that train, the devices, and where the run begins."""
    trained, frozen = (
        sum(x.size for x in jax.tree.leaves(part)) for part in (state.params, state.frozen)
    )
    count = f"{trained:,} of {trained + frozen:,}" if frozen else f"{trained:,}"
    first = int(state.step)
    origin = f"from step {first:,} of {workdir}" if first else f"in {workdir}"
    sizes = {} if mesh is None else {axis: n for axis, n in mesh.shape.items() if n > 1}
    return f"{count} parameters on {name_of(sizes) or jax.devices()[0]}, {origin}"


_SMALLER_STEPS = (
    "lower data.batch_size, or raise optimizer.accumulate_steps, which splits a batch into parts"
)
_SMALLER_EVALUATIONS = (
    "resume on a larger machine or mesh, or start again with more optimizer.accumulate_steps: the "
    "batches of an evaluation are as large as the parts of a training batch"
)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The loop of one run and what it uses."""

    task: Task
    config: dict[str, Any]
    graphdef: nnx.GraphDef
    dataset: Any
    checkpoints: Checkpoints
    writer: MetricsWriter | None
    progress: Progress
    stop: Stop
    mesh: Mesh | None
    profiler: Profiler
    sync_points: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    bases: Bases = ()
    history: Sequence[Mapping[str, Any]] = ()
    calls: Calls = NO_CALLS

    def run(self, state: TrainState, pending_evaluation: bool) -> TrainState:
        """Takes all remaining steps; `pending_evaluation`: and evaluates the given state before."""
        first = int(state.step)
        rows = local_rows(self.task.experiment.data.batch_size, self.mesh)
        batches: Any = self.task.batches(self.dataset, first, rows, order_of(self.history))
        with contextlib.closing(batches):
            if pending_evaluation:
                self._save(first, state, self._evaluate(first, state))
                if self.stop.requested:
                    self.checkpoints.wait()
                    raise Stopped(f"step {first:,} is saved; the same command resumes from there")
            return self._take_steps(state, batches)

    def _take_steps(self, state: TrainState, batches: Iterator[tuple[str, Any]]) -> TrainState:
        run, first = self.task.experiment.run, int(state.step)
        step_fn = jit_step(self.task, self.graphdef, state)
        flops: dict[Any, int] = {}  # by the form of a batch, for which a step is compiled
        batch_size = self.task.experiment.data.batch_size
        unreported: tuple[int, str, Any, int, StepMetrics] | None = None
        for step in range(first + 1, run.num_steps + 1):
            self.checkpoints.poll()
            view, batch = next(batches)
            placed = place(batch, self.mesh, batch_size)
            leaves, structure = jax.tree.flatten(placed)
            form = structure, *((x.shape, x.dtype) for x in leaves)
            if form not in flops:
                flops[form] = self.task.flops(self.dataset.tokenizer.vocab_size, batch)
                jax.block_until_ready(state)  # the time of the last step is none of compiling
                with self.progress.compiling(view):
                    compile_step(step_fn, state, placed)
            self.profiler.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, placed)
            self.profiler.after(step, state)
            self.stop.expect_save()
            stops = self._should_stop()
            saves = stops or run.evaluates(step) or run.saves(step)
            # Unless this step is saved, the device computes it while the host reports the last one.
            if unreported is not None:
                bad_steps = self._report(*unreported)
                if bad_steps and bad_steps % run.max_bad_steps == 0:
                    skipped = state.skipped - (metrics.bad_steps > 0)
                    state = self._go_back(step - 1, state, bad_steps, skipped)
                    state, metrics = step_fn(state, placed)  # as a resumed run would take it
            result = step, view, batch, flops[form], metrics
            unreported = None if saves else result
            if saves:
                bad_steps = self._report(*result)
                if bad_steps and bad_steps % run.max_bad_steps == 0:
                    state = self._go_back(step, state, bad_steps, state.skipped)
            scores = None
            if run.evaluates(step) and not stops:
                scores = self._evaluate(step, state)
                stops = scores is None
            if saves:
                self._save(step, state, scores)
            self._check_best_metric(scores)
            if stops:
                self.checkpoints.wait()
                raise Stopped(f"step {step:,} is saved; the same command resumes from there")
        return state

    def _should_stop(self) -> bool:
        """Whether to stop: asked after every step and before every batch of an evaluation.

        Several processes call it equally often, and all get the same answer to the same call.
        """
        if multihost_utils.reached_preemption_sync_point(next(self.sync_points)):
            self.stop.request()
        return self.stop.requested

    def _report(self, step: int, view: str, batch: Any, flops: int, metrics: StepMetrics) -> int:
        """Shows and writes a step; returns how many steps in a row were skipped up to it."""
        values = jax.device_get(metrics)
        experiment, tokens = self.task.experiment, self.task.num_tokens(batch)
        seen = dict(examples=experiment.data.batch_size, tokens=tokens, flops=flops)
        loss = float(values.loss.total)
        self.progress.update(step, loss=loss, **seen, view=view)
        if values.bad_steps:
            skipped = f"step {step:,} ({view}): loss or gradient is not finite, step skipped"
            self.progress.log(skipped)
        if self.writer and step % experiment.run.log_every == 0:
            schedule = make_schedule(experiment.optimizer, experiment.run.num_steps)
            rate = schedule(values.updates)
            speed = self.progress.speed()
            more = {"grad_norm": values.grad_norm, "learning_rate": rate, "view": view}
            found = values.loss._asdict() | more
            self.writer.write(step, "speed", speed)
            self.writer.write(step, "train", found)
            if self.calls.on_metrics is not None:
                self.calls.on_metrics(step, {**found, **speed})
        return int(values.bad_steps)

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float] | None:
        """The scores on the validation split; None where a request to stop interrupted it.

        Where the evaluation fails, the step is saved without it.
        """
        run = self.graphdef, state, self.dataset
        explained = explain_out_of_memory("an evaluation", _SMALLER_EVALUATIONS)
        try:
            with self.progress.paused(), explained:
                scores = self.task.validate(*run, self._should_stop)
        except Stopped:
            return None
        except Exception:
            # Saving takes all processes, and this may be the only one that fails.
            if jax.process_count() == 1:
                self._save(step, state, None)
            raise
        if self.writer:
            self.writer.write(step, "validation", scores)
            if self.calls.on_evaluation is not None:
                self.calls.on_evaluation(step, scores)
        self.progress.log(f"step {step:,} · {self.task.describe(scores)}")
        return scores

    def _check_best_metric(self, scores: Mapping[str, float] | None) -> None:
        """Raises ConfigError where an evaluation has no such score; the step is saved by then."""
        if scores is None:
            return
        chosen = [self.task.experiment.run.best_metric]
        check_names(chosen, list(scores), "run.best_metric: an evaluation", "score")

    def _save(self, step: int, state: TrainState, scores: Mapping[str, float] | None) -> None:
        if self.writer:
            self.writer.sync()
        with self.progress.paused():
            self.checkpoints.save(
                step,
                without_bases(state, self.bases),
                config=self.config,
                **self.task.beside(self.dataset)._asdict(),
                bases=records_of(self.bases, state.frozen) or None,
                history=list(self.history) or None,
                metrics=scores or {},
            )

    def _go_back(self, step: int, state: TrainState, bad_steps: int, skipped: Any) -> TrainState:
        """The state of the last checkpoint before the bad steps, with these step counts.

        step: the last bad step. The arrays of `state` are deleted.

        Raises TrainingDiverged the second time, or where there is no checkpoint.
        """
        self.checkpoints.wait()
        last = self.checkpoints.recover(self.progress.log, until=step - bad_steps)
        text = f"step {step:,}: loss or gradient has not been finite for {bad_steps} steps"
        if last is None or bad_steps > self.task.experiment.run.max_bad_steps:
            tried = "" if last is None else f", also not from the checkpoint of step {last:,}"
            raise TrainingDiverged(
                f"{text}{tried}; lower optimizer.learning_rate or set optimizer.clip_norm in a new "
                f"workdir, or look at the batches of steps {step - bad_steps + 1:,} to {step:,}"
            )
        self.progress.log(f"{text}; resuming with the parameters of step {last:,}")
        # Memory may not hold two states.
        for x in jax.tree.leaves((state.params, state.opt_state, state.ema)):
            x.delete()
        with explain_out_of_memory("the training state", "resume on a larger machine"):
            changed = {name: getattr(state, name) for name in ("params", "opt_state", "ema")}
            restored = self.checkpoints.restore(last, changed, partial=True)
        restored |= {
            "step": jnp.full_like(state.step, step),
            "skipped": skipped,
            "bad_steps": jnp.full_like(state.bad_steps, bad_steps),
        }
        return dataclasses.replace(state, **restored)
