"""Evaluation of a checkpoint on the test split of its own data or of other data."""

import contextlib
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slam_jax.data import DataConfig, Dataset, EvaluationBatch, Example, evaluation_batches, prepare
from slam_jax.data.views import VIEWS, with_halves
from slam_jax.errors import ConfigError, InputError
from slam_jax.evaluation.answers import Answer, Results, evaluate, most_frequent_answer
from slam_jax.evaluation.by_answer import figures_by_answer, untested_answers
from slam_jax.evaluation.scores import EXACT_MATCH, check_metrics
from slam_jax.reporting.processes.measure import measure_processes
from slam_jax.runtime.compile_cache import enable_compile_cache
from slam_jax.training import Experiment, Loaded, load, override, split_model
from slam_jax.training.checkpoint import Step
from slam_jax.training.metrics import read_metrics

_SHOWN_WRONG, _LEAST_SHOWN = 8, 4


class ShownExample(NamedTuple):
    """An example as one view showed it to the model, with the model's answers."""

    view: str
    example: Example
    answers: tuple[Answer, ...]


class Opened(NamedTuple):
    """A checkpoint and the data to evaluate it on. config: of the evaluation, which may read other
    data than `loaded.config`. data: its group `data`, built."""

    loaded: Loaded
    config: dict[str, Any]
    data: DataConfig
    dataset: Dataset

    def batches(self, view: str) -> Iterator[EvaluationBatch]:
        """Batches of the test split."""
        data = self.data
        return evaluation_batches(
            self.dataset.test, self.loaded.tokenizer, view, data.batch_size, seed=data.seed
        )

    @property
    def views(self) -> tuple[str, ...]:
        """The views that the run was trained on, as far as they show different things."""
        return self._distinct(self.data.views)

    @property
    def evaluated_views(self) -> tuple[str, ...]:
        """The same; with `data.drop_inputs` all views, as training has shown all mixes of inputs.

        Of views that show the same one is taken, as of `all` and `image` where there are pictures
        alone: the first that the run was trained on.
        """
        others = self.dataset.test.views if self.data.drop_inputs else ()
        return self._distinct((*self.data.views, *others))

    def _distinct(self, views: Sequence[str]) -> tuple[str, ...]:
        found: dict[Any, str] = {}
        for view in views:
            split = view if view in VIEWS and VIEWS[view].split else None
            found.setdefault((frozenset(self.dataset.test.streams(view)), split), view)
        return tuple(found.values())

    @property
    def max_new_tokens(self) -> int:
        """The tokens of the longest answer of the test split, and <eos>."""
        return self.dataset.test.answer_length(self.loaded.tokenizer) + 1


class Evaluation(NamedTuple):
    """An evaluated checkpoint.

    metrics: as in metrics.json. answers: all of them. config: of the evaluation, which may read
    other data than `loaded.config`. examples: those that the report shows. records: the metrics of
    the training run. seconds: how long the model took. folder: where the results belong.
    processes: of `measure_processes`; None where it was not asked for.
    """

    metrics: dict[str, Any]
    answers: list[Answer]
    loaded: Loaded
    config: dict[str, Any]
    examples: list[ShownExample]
    records: list[dict[str, Any]]
    title: str
    seconds: float
    folder: Path
    processes: dict[str, Any] | None = None


def open_checkpoint(
    workdir: str | Path,
    step: Step = None,
    overrides: Sequence[str] = (),
    base: Sequence[str | Path] = (),
    data_config: Mapping[str, Any] | None = None,
    dataset: Dataset | None = None,
) -> Opened:
    """Loads a checkpoint and prepares its data; arguments and errors of `evaluate_checkpoint`."""
    enable_compile_cache()
    loaded = load(workdir, step, base)
    if not isinstance(loaded, Loaded):
        raise InputError(f"{workdir} is a language model; `slam-eval --workdir` scores it")
    own = {**loaded.config, "run": {"metrics": [EXACT_MATCH], **loaded.config["run"]}}
    given = own if data_config is None else {**own, "data": dict(data_config)}
    config = override(given, overrides)
    compared = {**config, "run": {**config["run"], "metrics": own["run"]["metrics"]}}
    for group in config:
        if group != "data" and compared[group] != own[group]:
            raise ConfigError(
                f"config.{group} is part of the checkpoint; an evaluation changes config.data and "
                "config.run.metrics alone"
            )
    experiment = Experiment.from_config(config)
    data = experiment.data
    check_metrics(experiment.run.metrics)
    dataset = dataset or prepare(
        data, loaded.tokenizer, aux_format=loaded.aux_format, model=loaded.model.config
    )
    return Opened(loaded, config, data, dataset)


def evaluate_checkpoint(
    workdir: str | Path,
    step: Step = None,
    overrides: Sequence[str] = (),
    *,
    process_examples: int = 0,
    base: Sequence[str | Path] = (),
    data_config: Mapping[str, Any] | None = None,
    dataset: Dataset | None = None,
) -> Evaluation:
    """Evaluates the views that the run was trained on, on the test split. Writes no file;
    `slam_jax.reporting.write_evaluation` does.

    step: a number, "best" or "latest"; None = best. overrides: `--config.data.field=value`
    arguments that change where the data is and how it is read, and `--config.run.metrics=..`;
    everything else is the checkpoint's.
    process_examples: test examples per view for `evaluate_processes`, 0 = without it. base: folders
    in which to look first for base weights that the checkpoint names. data_config: the group
    `data` of another run, to use instead of the checkpoint's; the overrides change it. dataset:
    the data in place of what the configuration names, as for `slam_jax.train`.

    Raises:
      CheckpointError, ConfigError, DataError: something cannot be read or built, in one line.
      InputError: a metric needs a package that is missing.
    """
    workdir = Path(workdir)
    opened = open_checkpoint(workdir, step, overrides, base, data_config, dataset)
    loaded, config, data, dataset = opened
    started = time.monotonic()
    results = _evaluate(opened)
    seconds, identity = time.monotonic() - started, _identify(data, dataset)
    examples = {
        view: (example for batch in opened.batches(view) for example in batch.examples)
        for view in opened.evaluated_views
    }
    own = Experiment.from_config(loaded.config).data
    return Evaluation(
        metrics={**results.metrics, "data": identity, "data_config": config["data"]},
        answers=results.answers,
        loaded=loaded,
        config=config,
        examples=choose_examples(results, examples),
        records=read_metrics(workdir),
        title=workdir.absolute().name,
        seconds=seconds,
        folder=_results_folder(workdir / "eval", own, data, identity),
        processes=evaluate_processes(opened, process_examples) if process_examples else None,
    )


def evaluate_processes(opened: Opened, num_examples: int) -> dict[str, Any]:
    """`measure_processes` on the first examples of each view that the run was trained on.

    Views of which the test split has no example are left out.
    """
    size, batches = opened.data.batch_size, {}
    for view in opened.views:
        starts = range(0, num_examples, size)
        first = zip(starts, opened.batches(view), strict=False)
        batches[view] = [
            EvaluationBatch(
                batch, examples[: num_examples - start], min(valid, num_examples - start)
            )
            for start, (batch, examples, valid) in first
        ]
    shown = {view: found for view, found in batches.items() if found}
    loaded, longest = opened.loaded, opened.max_new_tokens
    return measure_processes(loaded.model, loaded.tokenizer, shown, max_new_tokens=longest)


def choose_examples(
    results: Results, examples: Mapping[str, Iterable[Example]]
) -> list[ShownExample]:
    """Some examples of each view: the first 8 that have a wrong answer, then the first whose
    answers are all right, at least 2 and so many that there are 4.

    examples: by view, all of which the results are; they are read up to the last one that is shown.
    """
    answers: dict[str, dict[int, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    for answer in results.answers:
        answers[answer.view][answer.number].append(answer)
    chosen = []
    for view, rows in examples.items():
        given = answers[view]
        wrong = [i for i in given if not all(a.correct for a in given[i])][:_SHOWN_WRONG]
        right = [i for i in given if all(a.correct for a in given[i])]
        shown = [*wrong, *right[: max(_LEAST_SHOWN - len(wrong), _LEAST_SHOWN // 2)]]
        found: dict[int, Example] = {}
        numbered = enumerate(rows)
        while not found.keys() >= {*shown}:
            place, example = next(numbered)
            found[place if example.record is None else example.record] = example
        chosen += [ShownExample(view, found[i], tuple(given[i])) for i in shown]
    return chosen


def _evaluate(opened: Opened) -> Results:
    loaded, _, _, dataset = opened
    training = list(dataset.train.answers())
    baseline = most_frequent_answer(training)
    results = evaluate(
        *split_model(loaded.model),
        {view: opened.batches(view) for view in with_halves(opened.evaluated_views)},
        loaded.tokenizer,
        step=loaded.step,
        max_new_tokens=opened.max_new_tokens,
        baseline_answer=baseline,
        metrics=Experiment.from_config(opened.config).run.metrics,
    )
    results.metrics["answers"] = figures_by_answer(results.answers, baseline=baseline)
    results.metrics["untested_answers"] = untested_answers(training, results.answers)
    return results


def _identify(config: DataConfig, dataset: Dataset) -> dict[str, Any]:
    """What a reader needs to know the data again; path and sha256 are those of a folder's table.

    notes: `Dataset.notes`.
    """
    path = None if dataset.table is None else str(dataset.table.path.absolute())
    known = {"sha256": None, **dataset.identity}
    return {"name": config.name, "path": path, **known, "notes": list(dataset.notes)}


def _results_folder(
    folder: Path, own: DataConfig, used: DataConfig, identity: Mapping[str, Any]
) -> Path:
    """`folder` for the data of the run itself, else a folder in it that is named after the data.

    Other data of the same name, from another path, get a folder of their own.
    """
    own_path, path = (os.path.realpath(data.path or "") for data in (own, used))
    if (own.name, own_path) == (used.name, path):
        return folder
    name = used.name.replace("/", "-")
    if used.path:
        name = (Path(path).stem if Path(path).is_file() else Path(path).name) or name
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
        if known["data"]["path"] != identity["path"]:
            name += "-" + hashlib.sha256(str(identity["path"]).encode()).hexdigest()[:8]
    return folder / name
