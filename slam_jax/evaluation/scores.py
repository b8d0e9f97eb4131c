"""Metrics of answers by name, with bootstrap intervals over scenes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from slam_jax.errors import check_names
from slam_jax.evaluation.answered import Answer
from slam_jax.evaluation.cider import cider, tokenise
from slam_jax.evaluation.metrics import resample_scenes, sum_by_scene
from slam_jax.evaluation.texts import absolute_error, anls, token_f1, within_tolerance
from slam_jax.evaluation.translations import (
    bleu,
    bleu_counts,
    chrf,
    chrf_counts,
    require_sacrebleu,
)
from slam_jax.evaluation.vqa import LEAST_REFERENCES, vqa_accuracy


class Metric(NamedTuple):
    """A score of many answers that depends on sums over them alone.

    label: its name in tables. counts: of answers, a row of figures each; the first is 1 where the
    answer counts, and 0 where the metric says nothing about it. score: of sums of such rows; NaN
    where no answer counts. percent: whether the score is a share, from 0 to 1. higher: whether a
    higher score is better.
    """

    label: str
    counts: Callable[[Sequence[Answer]], Float[np.ndarray, "n K"]]
    score: Callable[[Float[np.ndarray, "r K"]], Float[np.ndarray, "r"]]
    percent: bool = True
    higher: bool = True


class Score(NamedTuple):
    """A score, its 95% interval, what the most frequent answer would score, and the number of
    answers that count.

    None: no answer counts, no interval was asked for, or no most frequent answer is known.
    """

    score: float | None
    low: float | None
    high: float | None
    baseline: float | None
    n: int


def _mean(sums: Float[np.ndarray, "r 2"]) -> Float[np.ndarray, "r"]:
    with np.errstate(invalid="ignore"):
        return np.divide(sums[..., 1], sums[..., 0])


def _each(function: Callable[[str, Sequence[str]], float | None]) -> Callable[..., Any]:
    """The `counts` of a metric that is a mean of a figure of each answer; None does not count."""

    def counts(answers: Sequence[Answer]) -> Float[np.ndarray, "n 2"]:
        figures = [function(answer.predicted, answer.accepted) for answer in answers]
        rows = [(0.0, 0.0) if figure is None else (1.0, figure) for figure in figures]
        return np.array(rows, np.float64).reshape(-1, 2)

    return counts


def _together(function: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """The `counts` of a function of all answers and references, which all count."""

    def counts(answers: Sequence[Answer]) -> Float[np.ndarray, "n K"]:
        figures = function([a.predicted for a in answers], [a.accepted for a in answers])
        return np.concatenate([np.ones((len(answers), 1)), figures], axis=1)

    return counts


def _of_the_rest(score: Callable[..., np.ndarray]) -> Callable[..., Any]:
    """The `score` of a function of all sums but the first."""

    def scored(sums: Float[np.ndarray, "r K"]) -> Float[np.ndarray, "r"]:
        return np.where(sums[..., 0] > 0, score(sums[..., 1:]), np.nan)

    return scored


def _exact(answers: Sequence[Answer]) -> Float[np.ndarray, "n 2"]:
    return np.array([(1.0, answer.correct) for answer in answers], np.float64).reshape(-1, 2)


def _vqa(predicted: str, references: Sequence[str]) -> float | None:
    enough = len(references) >= LEAST_REFERENCES
    return vqa_accuracy(predicted, references) if enough else None


def _cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    words = [[tokenise(text) for text in texts] for texts in references]
    return cider([tokenise(text) for text in predictions], words)[:, None]


METRICS = {
    "exact_match": Metric("exact match", _exact, _mean),
    "vqa_accuracy": Metric("VQA accuracy", _each(_vqa), _mean),
    "anls": Metric("ANLS", _each(anls), _mean),
    "f1": Metric("F1 of words", _each(token_f1), _mean),
    "within_tolerance": Metric("number within 5%", _each(within_tolerance), _mean),
    "absolute_error": Metric(
        "mean absolute error", _each(absolute_error), _mean, percent=False, higher=False
    ),
    "bleu": Metric("BLEU", _together(bleu_counts), _of_the_rest(bleu), percent=False),
    "chrf": Metric("chrF", _together(chrf_counts), _of_the_rest(chrf), percent=False),
    "cider": Metric("CIDEr", _together(_cider), _mean, percent=False),
}
"""All metrics by the names that `run.metrics` takes."""

EXACT_MATCH = "exact_match"
_NEED_SACREBLEU = ("bleu", "chrf")


def check_metrics(names: Iterable[str], *, installed: bool = True) -> None:
    """Raises ConfigError for an unknown name and, with `installed`, InputError where a package is
    missing that one of the metrics needs."""
    names = tuple(names)
    check_names(names, list(METRICS), "run.metrics", "metric")
    if installed and set(names).intersection(_NEED_SACREBLEU):
        require_sacrebleu()


def score_answers(
    answers: Sequence[Answer],
    names: Iterable[str] = (EXACT_MATCH,),
    *,
    baseline: str | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Score]:
    """The scores of all `answers` together, by the names of `METRICS`.

    baseline: the most frequent answer of the training split, to score beside the model. seed,
    resamples: of the bootstrap over scenes; answers of different views about scenes of equal
    numbers are taken to be about the same scene. resamples=0: no intervals, which is faster.

    Raises ConfigError for an unknown metric, and InputError where a package is missing.
    """
    names = tuple(names)
    check_metrics(names)
    usual = [] if baseline is None else [a._replace(predicted=baseline) for a in answers]
    counts = {name: METRICS[name].counts(answers) for name in names}
    scenes = np.array([answer.scene for answer in answers], np.int64)
    intervals = _intervals(counts, scenes, seed, resamples) if resamples else {}
    found = {}
    for name in names:
        low, high = intervals.get(name, (None, None))
        score = _single(METRICS[name], counts[name])
        of_baseline = _single(METRICS[name], METRICS[name].counts(usual)) if usual else None
        found[name] = Score(score, low, high, of_baseline, int(counts[name][:, 0].sum()))
    return found


def show_score(name: str, score: float | None, *, sign: bool = False) -> str:
    """The score as tables show it: "98.8%", "31.2", "-" for None. sign: with + or -."""
    if score is None:
        return "-"
    plus, metric = "+" if sign else "", METRICS[name]
    if metric.percent:
        return f"{100 * score:{plus}.1f}" + ("" if sign else "%")
    return f"{score:{plus}.4g}"


def _single(metric: Metric, counts: Float[np.ndarray, "n K"]) -> float | None:
    score = float(metric.score(counts.sum(axis=0, keepdims=True))[0])
    return None if np.isnan(score) else score


def _intervals(
    counts: Mapping[str, Float[np.ndarray, "n _"]],
    scenes: Int[np.ndarray, "n"],
    seed: int,
    resamples: int,
) -> dict[str, tuple[float, float]]:
    """The intervals of the metrics for which some answer counts; those for which the same answers
    count share their draws, which take most of the time."""
    groups: dict[bytes, list[str]] = {}
    for name, rows in counts.items():
        groups.setdefault((rows[:, 0] > 0).tobytes(), []).append(name)
    found = {}
    for names in groups.values():
        used = counts[names[0]][:, 0] > 0
        if used.any():
            sums = [sum_by_scene(counts[name][used], scenes[used]) for name in names]
            drawn = resample_scenes(sums, seed=seed, resamples=resamples)
            for name, each in zip(names, drawn, strict=True):
                low, high = np.quantile(METRICS[name].score(each), [0.025, 0.975])
                found[name] = float(low), float(high)
    return found
