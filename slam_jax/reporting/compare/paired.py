"""Differences of two lists of answers to the same questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest

from slam_jax.errors import InputError, shorten
from slam_jax.evaluation.answered import Answer, group_by_slice
from slam_jax.evaluation.metrics import resample_scenes, sum_by_scene
from slam_jax.evaluation.scores import EXACT_MATCH, METRICS, Metric, check_metrics

ALL_VIEWS = "all views"
_MOST_ROWS = 50

Pairs = list[tuple[Answer, Answer]]


def pair_answers(a: Sequence[Answer], b: Sequence[Answer]) -> Pairs:
    """The two answers to each question of the views that both have, in the order of `a`.

    Raises InputError where the questions or their right answers differ, naming the first.
    """
    advice = "compare two evaluations of the same data, such as with --config.data.path=TABLE"
    views = [view for view in dict.fromkeys(x.view for x in a) if view in {x.view for x in b}]
    if not views:
        named = (", ".join(sorted({x.view for x in side})) for side in (a, b))
        raise InputError("no view is in both: {} and {}; {}".format(*named, advice))
    pairs: Pairs = []
    for view in views:
        ours, theirs = (
            sorted((x for x in side if x.view == view), key=lambda x: x.number) for side in (a, b)
        )
        if len(ours) != len(theirs):
            counts = f"{len(ours):,} and {len(theirs):,} questions"
            raise InputError(f"rows differ: view {view} has {counts}; {advice}")
        for one, other in zip(ours, theirs, strict=True):
            if _question(one) != _question(other):
                shown = (
                    shorten(f"{x.prompt!r} -> {x.expected!r} of {x.place or x.number}", 120)
                    for x in (one, other)
                )
                raise InputError("rows differ: view {}, {} and {}; {}".format(view, *shown, advice))
            pairs.append((one, other))
    return pairs


def _question(answer: Answer) -> tuple[Any, ...]:
    references = tuple(sorted(text.strip() for text in answer.accepted))
    return answer.number, answer.kind, answer.needs_both, answer.prompt, references


def compare_answers(
    pairs: Pairs, names: Sequence[str] = (EXACT_MATCH,), *, seed: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """The comparison as JSON.

    "views": by view, entry of the table and metric, the scores `a` and `b`, their `difference`
    b - a with its 95% interval `low` to `high` by paired bootstrap over scenes, and the number `n`
    of answers that count for both; for "exact_match" also `p`, of the exact sign test over scenes,
    which is McNemar's test where a scene has one question. Scores are None where no answer counts.
    With several slices the view "all views" has them together. "rows": see `_disagreements`.

    Sources: Efron and Tibshirani 1993, chapter 13; McNemar 1947.
    Raises ConfigError for an unknown metric, and InputError where a package is missing.
    """
    check_metrics(names)
    ours, theirs = (group_by_slice(side) for side in zip(*pairs, strict=True))
    slices = {key: list(zip(ours[key], theirs[key], strict=True)) for key in ours}
    if len(slices) > 1:
        slices[ALL_VIEWS, "all questions"] = [
            pair for pair in pairs if "_only_" not in pair[0].view
        ]
    views: dict[str, Any] = {}
    for (view, entry), group in slices.items():
        if group:
            views.setdefault(view, {})[entry] = {
                name: _difference(name, group, seed, resamples) for name in names
            }
    return {"views": views, "rows": _disagreements(pairs)}


def _difference(name: str, pairs: Pairs, seed: int, resamples: int) -> dict[str, Any]:
    metric, sides = METRICS[name], tuple(zip(*pairs, strict=True))
    a, b = (metric.counts(side) for side in sides)
    used = (a[:, 0] > 0) & (b[:, 0] > 0)
    found: dict[str, Any] = dict.fromkeys(("a", "b", "difference", "low", "high"))
    found["n"] = int(used.sum())
    if found["n"]:
        scenes = np.array([answer.scene for answer in sides[0]])[used]
        sums = [sum_by_scene(counts[used], scenes) for counts in (a, b)]
        found |= _interval(metric, sums, seed, resamples)
        if name == EXACT_MATCH:
            found["p"] = _sign_test(sums[1][:, 1] - sums[0][:, 1])
    return found


def _interval(
    metric: Metric, sums: Sequence[Float[np.ndarray, "scenes K"]], seed: int, resamples: int
) -> dict[str, float]:
    a, b = (float(metric.score(x.sum(axis=0, keepdims=True))[0]) for x in sums)
    drawn = resample_scenes(sums, seed=seed, resamples=resamples)
    of_a, of_b = (metric.score(x) for x in drawn)
    low, high = np.quantile(of_b - of_a, [0.025, 0.975])
    return {"a": a, "b": b, "difference": b - a, "low": float(low), "high": float(high)}


def _sign_test(differences: Float[np.ndarray, "scenes"]) -> float:
    """The two-sided p value of as many scenes in favour of one side, out of those that differ."""
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _disagreements(pairs: Pairs) -> dict[str, Any]:
    """Pairs of whole views whose texts differ, by what they change: `gained` (b alone is right),
    `lost` (a alone is), `other`. Each has the count `n`, and the first 50 as `rows`."""
    groups: dict[str, list[dict[str, Any]]] = {"gained": [], "lost": [], "other": []}
    counts = dict.fromkeys(groups, 0)
    for a, b in pairs:
        if "_only_" in a.view or a.predicted.strip() == b.predicted.strip():
            continue
        kind = "other" if a.correct == b.correct else "gained" if b.correct else "lost"
        counts[kind] += 1
        if len(groups[kind]) < _MOST_ROWS:
            shown = {name: getattr(a, name) for name in ("view", "scene", "place", "prompt")}
            shown |= {"references": list(dict.fromkeys(a.accepted))}
            groups[kind].append({**shown, "a": a.predicted, "b": b.predicted})
    return {kind: {"n": counts[kind], "rows": rows} for kind, rows in groups.items()}
