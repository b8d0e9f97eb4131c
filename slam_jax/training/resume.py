"""Starts a run, or resumes it from the newest intact checkpoint of its workdir."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from slam_jax.data import Dataset, prepare, tokenizer_from_json
from slam_jax.runtime.memory import explain_out_of_memory
from slam_jax.training.base import Bases, load_bases, locate, provided_by, without_bases
from slam_jax.training.checkpoint import CheckpointError, Checkpoints
from slam_jax.training.experiment import Experiment
from slam_jax.training.init_from import begin_from
from slam_jax.training.pretrained import bases_of, found_at, with_pretrained
from slam_jax.training.start import initial_state, state_shapes
from slam_jax.training.state import TrainState
from slam_jax.training.trainable import merge

MAY_CHANGE = (
    *("data.data_dir", "data.path", "data.max_damaged_records"),
    *("data.bucket_lengths", "data.workers"),
    *("loss.chunk_tokens", "model.remat", "model.scan_layers"),
    *("run.keep_every", "run.log_every", "run.save_every", "run.tensorboard"),
    *("run.init_from", "model.decoder.pretrained", "model.image.pretrained"),
)
"""Fields that may change between two starts of a run, as those of `mesh` may: where its data is,
how batches are padded and made, how it saves memory and compiles, what it writes, and what its
first step began with. What is computed from an undamaged record is the same."""


class OpenedRun(NamedTuple):
    """What the training loop begins with.

    experiment: with the fields that are read from folders of published parts.
    pending_evaluation: the last step was saved without its evaluation, which is still to be done.
    notes: messages for the user, one line each. bases: those of the model.
    """

    experiment: Experiment
    graphdef: nnx.GraphDef
    state: TrainState
    dataset: Dataset
    pending_evaluation: bool
    notes: list[str]
    bases: Bases = ()


def open_run(
    experiment: Experiment,
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
    records = {}
    if latest is None:
        model = with_pretrained(experiment.model)
    else:
        records = locate(checkpoints.read_bases(latest), moved)
        old = Experiment.from_config(checkpoints.read_config(latest))
        model = found_at(with_pretrained(experiment.model, old.model), records)
    experiment = dataclasses.replace(experiment, model=model)
    if latest is not None:
        _require_same_config(experiment, checkpoints, latest)
    dataset = _open_dataset(experiment, checkpoints, latest)
    experiment.check(mesh, dataset)
    vocab_size = dataset.tokenizer.vocab_size
    with explain_out_of_memory("the training state", "choose smaller sizes or a larger machine"):
        if latest is None:
            bases = bases_of(experiment.model)
            graphdef, state = initial_state(experiment, vocab_size, mesh, bases)
            if experiment.run.init_from is not None:
                source = experiment.run.init_from, checkpoints.workdir, moved
                state, report = begin_from(*source, state, dataset.tokenizer, provided_by(bases))
                notes.append(report)
            return OpenedRun(experiment, graphdef, state, dataset, False, notes, bases)
        bases = bases_of(experiment.model, records)
        graphdef, like = state_shapes(experiment, vocab_size, mesh, bases)
        state = restore_state(checkpoints, latest, like, bases)
    pending = experiment.run.evaluates(latest) and not checkpoints.read_metrics(latest)
    return OpenedRun(experiment, graphdef, state, dataset, pending, notes, bases)


def restore_state(
    checkpoints: Checkpoints, step: int, like: TrainState, bases: Bases
) -> TrainState:
    """The state of a checkpoint, with the frozen parameters that bases provide.

    Raises CheckpointError as `Checkpoints.restore` does, and InputError as `load_bases` does.
    """
    state = checkpoints.restore(step, without_bases(like, bases))
    frozen = merge(state.frozen, load_bases(bases, like.frozen))
    return dataclasses.replace(state, frozen=frozen)


def _open_dataset(experiment: Experiment, checkpoints: Checkpoints, latest: int | None) -> Dataset:
    """The data set. Of a resumed run it must give the tokenizer and the format of numbers that the
    checkpoint has, or token ids and standardised numbers would change their meaning."""
    dataset = prepare(experiment.data, model=experiment.model)
    if latest is None:
        return dataset
    advice = "the data set has changed; restore the old one, or use another workdir"
    tokenizer = tokenizer_from_json(checkpoints.read_tokenizer(latest))
    if dataset.corpus_is_whole and tokenizer.sha256 != dataset.tokenizer.sha256:
        raise CheckpointError(
            f"{checkpoints.workdir} holds a run with a tokenizer of sha256 "
            f"{tokenizer.sha256[:12]}, and the data now gives {dataset.tokenizer.sha256[:12]}: "
            f"{advice}"
        )
    saved, format_now = checkpoints.read_aux(latest), dataset.aux_format
    if saved is not None and (format_now is None or saved != format_now.to_json()):
        raise CheckpointError(
            f"{checkpoints.workdir} holds a run with other columns of numbers, or other numbers in "
            f"them: {advice}"
        )
    if dataset.tokenizer != tokenizer:  # damaged records were missing from the text it learned
        dataset = prepare(experiment.data, tokenizer, model=experiment.model)
    return dataset


def _require_same_config(experiment: Experiment, checkpoints: Checkpoints, latest: int) -> None:
    """Raises CheckpointError where a field differs that may not change."""
    # The defaults of fields that an old configuration lacks are filled in.
    old = Experiment.from_config(checkpoints.read_config(latest))
    saved, ours = (flatten_dict(dataclasses.asdict(each), sep=".") for each in (old, experiment))
    for name, value in ours.items():
        may_change = name in MAY_CHANGE or name.startswith("mesh.")
        # It says how a folder's table is read, and nothing about other data sets.
        may_change |= name == "data.table_version" and experiment.data.name != "folder"
        if saved[name] != value and not may_change:
            raise CheckpointError(
                f"{checkpoints.workdir} holds a run with {name}={saved[name]!r} and this one has "
                f"{name}={value!r}; use another workdir or the same configuration"
            )
