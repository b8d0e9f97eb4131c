"""Starts a run, or resumes it from the newest intact checkpoint of its workdir."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh

from slam_jax.runtime.memory import explain_out_of_memory
from slam_jax.training.base import Bases, load_bases, locate, provided_by, without_bases
from slam_jax.training.changes import (
    DATA,
    ON_REQUEST,
    Changes,
    changed_at,
    check_steps,
    differences,
    extended,
    read_saved,
)
from slam_jax.training.checkpoint import CheckpointError, Checkpoints
from slam_jax.training.init_from import begin_from
from slam_jax.training.kinds import task_of
from slam_jax.training.progress import PATIENCE
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import initial_state, state_shapes
from slam_jax.training.state import TrainState
from slam_jax.training.task import Task
from slam_jax.training.trainable import merge


class OpenedRun(NamedTuple):
    """What the training loop begins with.

    task: with the fields that are read from folders of published parts.
    pending_evaluation: the last step was saved without its evaluation, which is still to be done.
    notes: messages for the user, one line each. bases: those of the model. history: of changes.
    """

    task: Task
    graphdef: nnx.GraphDef
    state: TrainState
    dataset: Any
    pending_evaluation: bool
    notes: list[str]
    bases: Bases = ()
    history: Sequence[Mapping[str, Any]] = ()


def open_run(
    task: Task,
    checkpoints: Checkpoints,
    mesh: Mesh | None,
    moved: Sequence[str | Path] = (),
    change: bool = False,
    dataset: Any = None,
    log: Callable[[str], Any] = lambda line: None,
) -> OpenedRun:
    """The initial state of a run, or the newest one of its checkpoints, and the data set.

    moved: folders in which to look for base weights; see `locate`. change: the configuration and
    the data may differ from those of the checkpoint, see `slam_jax.training.changes`. dataset: in
    place of what the configuration names. log: is called with a line for the user before a model is
    initialised.

    Raises:
      CheckpointError: the checkpoints belong to another configuration or to other data, or none
        of them can be read.
      ConfigError, OutOfMemory: the run cannot be built, or does not fit.
      InputError: base weights are missing or were changed.
    """
    notes: list[str] = []
    latest = checkpoints.recover(notes.append)
    old, records = None, {}
    if latest is not None:
        records = locate(checkpoints.read_bases(latest), moved)
        old = task_of(checkpoints.read_config(latest))
        if type(old) is not type(task):
            kind = "language model" if isinstance(task, SlamV3Task) else "SLAM v3"
            raise CheckpointError(f"{checkpoints.workdir} holds the run of a {kind}; use another")
    task = task.opened(old, records)
    changes = _changes(task, old, checkpoints, change)
    dataset = task.open_dataset(checkpoints, latest, changed=change, given=dataset)
    task.check(mesh, dataset)
    history: list[Any] = []
    if latest is not None and old is not None:
        data, history = read_saved(checkpoints, latest)
        changes |= _changed_data(data, task.beside(dataset).data or {}, checkpoints, change)
        if changes:
            history = extended(history, changes, latest, old.experiment.data.batch_size)
            notes.append(f"changed after step {latest:,}: {changed_at(history, latest)}")
        check_steps(task.experiment.run.num_steps, latest)
    vocab_size = dataset.tokenizer.vocab_size
    with explain_out_of_memory("the training state", "choose smaller sizes or a larger machine"):
        if latest is None:
            log(f"initialising the model; {PATIENCE}")
            bases = task.bases()
            graphdef, state = initial_state(task, vocab_size, mesh, bases)
            if task.init_from is not None:
                source = task.init_from, checkpoints.workdir, moved
                state, report = begin_from(*source, state, dataset.tokenizer, provided_by(bases))
                notes.append(report)
            return OpenedRun(task, graphdef, state, dataset, False, notes, bases)
        bases = task.bases(records)
        graphdef, like = state_shapes(task, vocab_size, mesh, bases)
        state = restore_state(checkpoints, latest, like, bases)
    pending = task.experiment.run.evaluates(latest) and not checkpoints.read_metrics(latest)
    return OpenedRun(task, graphdef, state, dataset, pending, notes, bases, history)


def restore_state(
    checkpoints: Checkpoints, step: int, like: TrainState, bases: Bases
) -> TrainState:
    """The state of a checkpoint, with the frozen parameters that bases provide.

    Raises CheckpointError as `Checkpoints.restore` does, and InputError as `load_bases` does.
    """
    state = checkpoints.restore(step, without_bases(like, bases))
    frozen = merge(state.frozen, load_bases(bases, like.frozen))
    return dataclasses.replace(state, frozen=frozen)


def _changes(task: Task, old: Task | None, checkpoints: Checkpoints, change: bool) -> Changes:
    """The fields that were changed. Raises CheckpointError for one that may not be."""
    if old is None:
        return {}
    found = differences(old.experiment, task.experiment)
    for name, (saved, value) in found.items():
        if change and name in ON_REQUEST:
            continue
        advice = "use another workdir or the same configuration"
        if name in ON_REQUEST:
            advice += ", or resume with the new value by --change"
        raise CheckpointError(
            f"{checkpoints.workdir} holds a run with {name}={saved!r} and this one has "
            f"{name}={value!r}; {advice}"
        )
    return found


def _changed_data(
    saved: Mapping[str, Any], ours: Mapping[str, Any], checkpoints: Checkpoints, change: bool
) -> Changes:
    """Old and new sha256 of the data where they differ. Raises CheckpointError without `change`."""
    hashes = [each.get("sha256") for each in (saved, ours)]
    if None in hashes or hashes[0] == hashes[1]:
        return {}
    if not change:
        rows = (each.get("rows", {}).get("train", 0) for each in (saved, ours))
        before, now = (f"{count:,} rows for training" for count in rows)
        raise CheckpointError(
            f"{checkpoints.workdir} holds a run on data with {before}, and they have changed: "
            f"there are {now} now; restore the old ones, use another workdir, or resume with the "
            "new data by --change"
        )
    return {DATA: hashes}
