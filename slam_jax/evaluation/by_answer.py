"""Figures by expected answer: how often it is right, and what is answered instead."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from slam_jax.errors import shorten
from slam_jax.evaluation.answered import Answer
from slam_jax.evaluation.metrics import bootstrap_interval

_MOST_ANSWERS, _MOST_CONFUSIONS, _LONGEST = 30, 3, 200
_LEAST_SHARE, _MOST_UNTESTED = 0.01, 10


def figures_by_answer(
    answers: Sequence[Answer], *, baseline: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """The figures as JSON: `pooled` over all views, and by view in `views`.

    Each has `answers`, a list by falling count of at most 30: the expected answer, of several right
    ones the most frequent; `n`, `accuracy` with its 95% interval `low` to `high`; `instead`, the
    most frequent wrong answers with their counts; and `baseline`, what always giving that answer
    would score. `others` are the answers that have no place in the list, together; None = all have
    one. Views that show half of a scene are left out.
    """
    views: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if "_only_" not in answer.view:
            views[answer.view].append(answer)
    pooled = [answer for group in views.values() for answer in group]
    return {
        "pooled": _figures(pooled, baseline, seed),
        "views": {view: _figures(group, baseline, seed) for view, group in views.items()},
    }


def _figures(answers: Sequence[Answer], baseline: str | None, seed: int) -> dict[str, Any]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.usual].append(answer)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    others = [answer for _, group in ordered[_MOST_ANSWERS:] for answer in group]
    return {
        "answers": [
            {
                "answer": shorten(expected, _LONGEST),
                **_row(group, baseline, seed),
                "instead": _confusions(group),
            }
            for expected, group in ordered[:_MOST_ANSWERS]
        ],
        "others": {
            "answers": len(ordered) - _MOST_ANSWERS,
            **_row(others, baseline, seed),
        }
        if others
        else None,
    }


def _row(group: Sequence[Answer], baseline: str | None, seed: int) -> dict[str, Any]:
    by_scene: dict[int, list[bool]] = defaultdict(list)
    for answer in group:
        by_scene[answer.scene].append(answer.correct)
    mean, low, high = bootstrap_interval(by_scene.values(), seed=seed)
    row = {"n": len(group), "accuracy": mean, "low": low, "high": high}
    if baseline is not None:
        right = sum(answer._replace(predicted=baseline).correct for answer in group)
        row["baseline"] = right / len(group)
    return row


def _confusions(group: Iterable[Answer]) -> list[dict[str, Any]]:
    wrong = Counter(answer.predicted.strip() for answer in group if not answer.correct)
    common = wrong.most_common(_MOST_CONFUSIONS)
    return [{"answer": shorten(text, _LONGEST), "n": count} for text, count in common]


def untested_answers(training: Iterable[str], answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """The answers of training that are the right one of no test question, with their share.

    Only those of at least 1% of the training answers, and at most 10. training: the answers of the
    training split, or of a sample of it.
    """
    counts = Counter(map(str.strip, training))
    tested = {text.strip() for answer in answers for text in answer.accepted}
    found = [
        {"answer": shorten(text, _LONGEST), "share": count / counts.total()}
        for text, count in counts.most_common()
        if text not in tested and count >= _LEAST_SHARE * counts.total()
    ]
    return found[:_MOST_UNTESTED]
