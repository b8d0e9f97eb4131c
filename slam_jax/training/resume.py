"""Starts a run, or resumes it from the newest intact checkpoint of its workdir."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from slam_jax.runtime.memory import explain_out_of_memory
from slam_jax.training.base import Bases, load_bases, locate, provided_by, without_bases
from slam_jax.training.checkpoint import CheckpointError, Checkpoints
from slam_jax.training.init_from import begin_from
from slam_jax.training.kinds import task_of
from slam_jax.training.start import initial_state, state_shapes
from slam_jax.training.state import TrainState
from slam_jax.training.task import Task
from slam_jax.training.trainable import merge

MAY_CHANGE = (
    *("data.data_dir", "data.path", "data.max_damaged_records"),
    *("data.bucket_lengths", "data.workers"),
    *("loss.chunk_tokens", "model.remat", "model.scan_layers"),
    *("run.keep_every", "run.log_every", "run.save_every", "run.tensorboard", "run.best_metric"),
    *("run.init_from", "model.decoder.pretrained", "model.image.pretrained"),
)
"""Fields that may change between two starts of a run, as those of `mesh` may: where its data is,
how batches are padded and made, how it saves memory and compiles, what it writes, and what its
first step began with. What is computed from an undamaged record is the same."""


class OpenedRun(NamedTuple):
    """What the training loop begins with.

    task: with the fields that are read from folders of published parts.
    pending_evaluation: the last step was saved without its evaluation, which is still to be done.
    notes: messages for the user, one line each. bases: those of the model.
    """

    task: Task
    graphdef: nnx.GraphDef
    state: TrainState
    dataset: Any
    pending_evaluation: bool
    notes: list[str]
    bases: Bases = ()


def open_run(
    task: Task,
    checkpoints: Checkpoints,
    mesh: Mesh | None,
    moved: Sequence[str | Path] = (),
) -> OpenedRun:
    """The initial state of a run, or the newest one of its checkpoints, and the data set.

    moved: folders in which to look for base weights; see `locate`.

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
    task = task.opened(old, records)
    if old is not None:
        _require_same_config(task, old, checkpoints)
    dataset = task.open_dataset(checkpoints, latest)
    task.check(mesh, dataset)
    vocab_size = dataset.tokenizer.vocab_size
    with explain_out_of_memory("the training state", "choose smaller sizes or a larger machine"):
        if latest is None:
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
    return OpenedRun(task, graphdef, state, dataset, pending, notes, bases)


def restore_state(
    checkpoints: Checkpoints, step: int, like: TrainState, bases: Bases
) -> TrainState:
    """The state of a checkpoint, with the frozen parameters that bases provide.

    Raises CheckpointError as `Checkpoints.restore` does, and InputError as `load_bases` does.
    """
    state = checkpoints.restore(step, without_bases(like, bases))
    frozen = merge(state.frozen, load_bases(bases, like.frozen))
    return dataclasses.replace(state, frozen=frozen)


def _require_same_config(task: Task, old: Task, checkpoints: Checkpoints) -> None:
    """Raises CheckpointError where a field differs that may not change."""
    # The defaults of fields that an old configuration lacks are filled in.
    both = old.experiment, task.experiment
    saved, ours = (flatten_dict(dataclasses.asdict(each), sep=".") for each in both)
    for name, value in ours.items():
        may_change = name in MAY_CHANGE or name.startswith("mesh.")
        # It says how a folder's table is read, and nothing about other data sets.
        may_change |= name == "data.table_version" and task.experiment.data.name != "folder"
        if saved[name] != value and not may_change:
            raise CheckpointError(
                f"{checkpoints.workdir} holds a run with {name}={saved[name]!r} and this one has "
                f"{name}={value!r}; use another workdir or the same configuration"
            )
