"""Runs of SLAM v3: its model, its batches and its scores."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from slam_jax.data import (
    AuxFormat,
    Batch,
    Dataset,
    EvaluationBatch,
    describe,
    evaluation_batches,
    prepare,
    tokenizer_from_json,
    training_batches,
)
from slam_jax.data.order import Order
from slam_jax.errors import check_names
from slam_jax.evaluation import evaluate
from slam_jax.runtime.signals import Stopped
from slam_jax.slam_v3 import SlamV3
from slam_jax.training.base import BaseRecord, Bases
from slam_jax.training.checkpoint import CheckpointError, Checkpoints, is_loss
from slam_jax.training.experiment import Experiment
from slam_jax.training.flops import forward_flops
from slam_jax.training.losses import LossParts, num_answer_tokens, slam_v3_loss
from slam_jax.training.pretrained import bases_of, found_at, with_groups, with_pretrained
from slam_jax.training.state import TrainState
from slam_jax.training.task import Beside


@dataclasses.dataclass(frozen=True)
class SlamV3Task:
    """The training of a SLAM v3; see `slam_jax.training.task.Task`."""

    experiment: Experiment

    @property
    def num_processes(self) -> int:
        return self.experiment.model.num_processes

    @property
    def init_from(self) -> str | None:
        return self.experiment.run.init_from

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return self.experiment.model.precision()

    def check(self, mesh: Mesh | None, dataset: Dataset | None = None) -> None:
        self.experiment.check(mesh, dataset)

    def opened(self, old: "SlamV3Task | None", records: Mapping[str, BaseRecord]) -> "SlamV3Task":
        known = None if old is None else old.experiment.model
        model = found_at(with_pretrained(self.experiment.model, known), records)
        return SlamV3Task(dataclasses.replace(self.experiment, model=model))

    def stored(self, config: dict[str, Any]) -> dict[str, Any]:
        return with_groups(config, self.experiment.model)

    def bases(self, records: Mapping[str, BaseRecord] | None = None) -> Bases:
        return bases_of(self.experiment.model, records)

    def open_dataset(
        self,
        checkpoints: Checkpoints,
        latest: int | None,
        changed: bool = False,
        given: Dataset | None = None,
    ) -> Dataset:
        """A resumed run needs the tokenizer and the format of numbers of its checkpoint, or token
        ids and standardised numbers would change their meaning."""
        data, model = self.experiment.data, self.experiment.model
        if given is not None:
            views = given.train.views
            check_names(data.views, views, "data.stages: the given data set", "view")
        if latest is None:
            return given or prepare(data, model=model)
        tokenizer = tokenizer_from_json(checkpoints.read_tokenizer(latest))
        saved = checkpoints.read_aux(latest)
        if changed and given is None:
            aux_format = None if saved is None else AuxFormat.from_json(saved)
            return prepare(data, tokenizer, aux_format=aux_format, model=model)
        dataset = given or prepare(data, model=model)
        advice = (
            "the data set has changed; restore the old one, use another workdir, or resume with "
            "the new data by --change"
        )
        if dataset.corpus_is_whole and tokenizer.sha256 != dataset.tokenizer.sha256:
            raise CheckpointError(
                f"{checkpoints.workdir} holds a run with a tokenizer of sha256 "
                f"{tokenizer.sha256[:12]}, and the data now gives {dataset.tokenizer.sha256[:12]}: "
                f"{advice}"
            )
        format_now = dataset.aux_format
        if saved is not None and (format_now is None or saved != format_now.to_json()):
            raise CheckpointError(
                f"{checkpoints.workdir} holds a run with other columns of numbers, or other "
                f"numbers in them: {advice}"
            )
        if dataset.tokenizer != tokenizer and given is None:
            # Damaged records were missing from the text that it learned.
            dataset = prepare(data, tokenizer, model=model)
        return dataset

    def introduce(self, dataset: Dataset) -> list[str]:
        return describe(dataset, self.experiment.data)

    def beside(self, dataset: Dataset) -> Beside:
        splits, aux = (dataset.train, dataset.validation), dataset.aux_format
        longest_answer = max(split.answer_length(dataset.tokenizer) for split in splits)
        return Beside(
            tokenizer=dataset.tokenizer.to_json(),
            aux=None if aux is None else aux.to_json(),
            generation={"max_new_tokens": longest_answer + 1},
            data=dataset.identity,
        )

    def model(self, vocab_size: int) -> Callable[..., SlamV3]:
        return functools.partial(SlamV3, self.experiment.with_vocabulary(vocab_size))

    def loss(self, model: SlamV3, batch: Batch, *, key: Any = None) -> LossParts:
        return slam_v3_loss(model, batch, self.experiment.loss, key=key)

    def weight_of(self, batch: Batch) -> Any:
        return num_answer_tokens(batch)

    def batches(
        self, dataset: Dataset, start_step: int, rows: Sequence[int], order: Order
    ) -> Iterator[tuple[str, Batch]]:
        parts = dataset.train, dataset.tokenizer, self.experiment.data
        return training_batches(*parts, start_step=start_step, rows=rows, order=order)

    def num_tokens(self, batch: Batch) -> int:
        # A process of several has a part of the rows; those of the others are about as long.
        return round(np.sum(batch.length) * self.experiment.data.batch_size / len(batch.tokens))

    def flops(self, vocab_size: int, batch: Batch) -> int:
        """By the convention of `forward_flops`."""
        model = self.experiment.with_vocabulary(vocab_size)
        forward = forward_flops(model, self.experiment.loss, batch)
        return 3 * self.experiment.data.batch_size * forward

    def validate(
        self,
        graphdef: nnx.GraphDef,
        state: TrainState,
        dataset: Dataset,
        should_stop: Callable[[], bool],
    ) -> dict[str, float]:
        return validate(self.experiment, graphdef, state, dataset, should_stop)

    def describe(self, scores: Mapping[str, float]) -> str:
        whole = [f"validation {100 * scores['accuracy']:.1f} %", f"loss {scores['loss']:.3f}"]
        own = [name for name in scores if name != "accuracy" and not is_loss(name)]
        return " · ".join([*whole, *(f"{name} {100 * scores[name]:.1f}" for name in own)])


def validate(
    experiment: Experiment,
    graphdef: nnx.GraphDef,
    state: TrainState,
    dataset: Dataset,
    should_stop: Callable[[], bool],
) -> dict[str, float]:
    """The scores on the validation split.

    The accuracy of generated answers is "view/kind", and "accuracy" the mean of these. The mean
    cross-entropy of the tokens of the expected answers, in nats, is "loss/view", and "loss" the
    mean of these.

    should_stop: called before each batch; where it returns True, `Stopped` is raised.
    """
    run, data, parts = experiment.run, experiment.data, experiment.optimizer.accumulate_steps
    size, count = data.batch_size // parts, run.evaluate_batches and run.evaluate_batches * parts

    def batches(view: str) -> Iterator[EvaluationBatch]:
        some: Any = dict(seed=data.seed, shuffled=count is not None)
        all_batches = evaluation_batches(dataset.validation, dataset.tokenizer, view, size, **some)
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
    losses = {f"loss/{view}": loss for view, loss in results.losses.items()}
    means = (float(np.mean(list(each.values()))) for each in (scores, losses))
    return {**dict(zip(("accuracy", "loss"), means, strict=True)), **scores, **losses}
