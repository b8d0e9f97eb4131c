"""Evaluation of a language model on texts: the run of one on its test split, or a published one."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from slam_jax.data.packing import scoring_batches
from slam_jax.data.text_dataset import TextDataset, open_texts
from slam_jax.data.texts import TextDataConfig
from slam_jax.errors import ConfigError
from slam_jax.evaluation.language import score_texts, text_intervals
from slam_jax.evaluation.table import make_console, percent, print_table, write_metrics
from slam_jax.generation import ModelAndTokenizer
from slam_jax.interop.pretrained import is_published
from slam_jax.language_models.slam_v3_text import SlamV3TextConfig
from slam_jax.runtime.compile_cache import enable_compile_cache
from slam_jax.training.checkpoint import Step
from slam_jax.training.experiment import as_json, build, is_language, override
from slam_jax.training.loading import load, read_saved

_LENGTH = 1_024  # tokens a row of a published model, unless its context is shorter
_SHARES = ("accuracy", "exact_match", "token_accuracy")


class LanguageEvaluation(NamedTuple):
    """metrics: as in metrics.json. folder: where it belongs. seconds: how long the model took."""

    metrics: dict[str, Any]
    folder: Path
    seconds: float


def is_language_model(workdir: str | Path, step: Step = None) -> bool:
    """Whether a published language model or the run of one is there; raises as `load` does."""
    return is_published(workdir) or is_language(read_saved(workdir, step).config)


def evaluate_language(
    workdir: str | Path,
    step: Step = None,
    overrides: Sequence[str] = (),
    *,
    base: Sequence[str | Path] = (),
) -> LanguageEvaluation:
    """Scores the texts that `data.evaluate` names; by default those of the test split of a run, and
    all texts for a published model. Writes no file.

    overrides: `--config.data.field=value` arguments. Other arguments and errors: see
    `slam_jax.reporting.checkpoint.evaluate_checkpoint`.

    Raises ConfigError where a published model is given no texts.
    """
    enable_compile_cache()
    loaded, published = load(workdir, step, base), is_published(workdir)
    model_config = loaded.model.config
    if published:
        length = min(_LENGTH, model_config.context_length)
        plain = TextDataConfig(evaluate="all", held_out=0.0, length=length, batch_size=8)
        own: dict[str, Any] = as_json({"language_model": {}, "data": dataclasses.asdict(plain)})
    else:
        own = loaded.config
    config = override(own, overrides)
    for group in config:
        if group != "data" and config[group] != own[group]:
            raise ConfigError(
                f"config.{group} is part of the model; an evaluation changes config.data alone"
            )
    data: TextDataConfig = build(TextDataConfig, config["data"], "data.")
    most = model_config.context_length
    if data.length > most:
        raise ConfigError(f"data.length is {data.length:,}; expected at most {most:,}, the context")
    can_pack = not isinstance(model_config, SlamV3TextConfig)
    dataset = open_texts(data, loaded.tokenizer, can_pack=can_pack)
    started = time.monotonic()
    metrics = _measure(loaded, dataset, data)
    seconds = time.monotonic() - started
    if not published:
        metrics = {"step": loaded.step, **metrics}
    return LanguageEvaluation(metrics, _folder(workdir, own, data, published), seconds)


def _measure(
    loaded: ModelAndTokenizer, dataset: TextDataset, data: TextDataConfig
) -> dict[str, Any]:
    source, answers = dataset.splits[data.evaluate], dataset.has_answers
    batches = scoring_batches(source, data.batch_size)
    graphdef, params = nnx.split(loaded.model)
    scores = score_texts(graphdef, params, batches, loaded.tokenizer.token_bytes)
    intervals = text_intervals(scores, answers=answers)
    return {
        "split": data.evaluate,
        "texts": len(scores.tokens),
        "tokens": int(scores.tokens.sum()),
        "bytes": int(scores.bytes.sum()),
        "scores": {name: each._asdict() for name, each in intervals.items()},
        "data": {
            "name": data.name,
            "path": dataset.place,
            "length": data.length,
            "answers": answers,
            "notes": list(dataset.notes),
        },
    }


def print_language_metrics(metrics: dict[str, Any], file: Any = None) -> None:
    """Prints each figure with its 95% interval.

    file: a text file, standard output by default.
    """
    rows = []
    for name, each in metrics["scores"].items():
        figures = (each["mean"], each["low"], each["high"])
        mean, low, high = (percent(x) if name in _SHARES else f"{x:.4g}" for x in figures)
        rows.append((name.replace("_", " "), mean, f"{low} to {high}"))
    kind = "answers" if metrics["data"]["answers"] else "texts"
    step = f"step {metrics['step']:,}, " if "step" in metrics else ""
    title = f"{step}{metrics['split']} of {metrics['data']['path']}: {metrics['texts']:,} {kind}, "
    title += f"{metrics['tokens']:,} tokens"
    print_table(make_console(file), title, ("", "score", "95% interval"), rows)


def write_language_metrics(evaluation: LanguageEvaluation, out: str | Path | None = None) -> Path:
    """Writes metrics.json and returns its path. out: the folder, by default that of the evaluation.

    Raises WriteError where it cannot be written.
    """
    path = (evaluation.folder if out is None else Path(out)) / "metrics.json"
    write_metrics(path, evaluation.metrics)
    return path


def _folder(
    workdir: str | Path, own: dict[str, Any], data: TextDataConfig, published: bool
) -> Path:
    """That of the results: `eval` in the workdir, and below it one for other texts; for a published
    model a folder of its name below `eval` here."""
    named = Path(data.path).absolute().stem if data.path else data.name.replace("/", "-")
    if published:
        return Path("eval") / f"{Path(workdir).absolute().stem}-{named}"
    folder = Path(workdir) / "eval"
    same = (own["data"]["name"], own["data"]["path"]) == (data.name, data.path)
    folder = folder if same else folder / named
    return folder if data.evaluate == "test" else folder / data.evaluate
