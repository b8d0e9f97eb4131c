"""Numbers of a leaderboard's rows: intervals, winners, scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit

from slam_jax.rocket.tasks import Json

RESAMPLES = 2_000


class Ratio(NamedTuple):
    """The sum of `above` over the sum of `below`, both over seeds and units (documents, scenes)."""

    above: Float[np.ndarray, "seeds units"]
    below: Float[np.ndarray, "seeds units"]

    def of_seeds(self) -> list[float]:
        return (self.above.sum(1) / self.below.sum(1)).tolist()

    def values(self, drawn: Int[np.ndarray, "resamples units"]) -> Float[np.ndarray, "_"]:
        """The figure, that of each seed, and that of each resample of the units."""
        above, below = (
            np.concatenate([[part.sum()], part.sum(1), drawn @ part.sum(0)]) for part in self
        )
        return above / below


def interval(figure: Ratio, minus: Ratio | None = None) -> Json:
    """The 95% interval of a figure, or of its paired difference to another.

    Seeds and units vary independently, so that the half-widths add in quadrature. Over units, a
    bootstrap of 2,000 resamples. Over S seeds, too few for a bootstrap, t s / sqrt(S), with s the
    standard deviation over seeds and t Student's quantile for S - 1 degrees of freedom. With a
    single seed the interval does not include the variation over seeds, which is then unknown.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
    """
    seeds, units = figure.above.shape
    drawn = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
    values = figure.values(drawn) - (0.0 if minus is None else minus.values(drawn))
    mean, over_seeds = float(values[0]), 0.0
    half_widths = np.quantile(values[1 + seeds :], [0.025, 0.975]) - mean
    if seeds > 1:
        deviation = np.std(values[1 : 1 + seeds], ddof=1)
        over_seeds = stdtrit(seeds - 1, 0.975) * deviation / np.sqrt(seeds)
    low, high = np.hypot(half_widths, over_seeds)
    return {"mean": mean, "low": float(mean - low), "high": float(mean + high)}


class Metric(NamedTuple):
    """One number of every row.

    path: its field, with dots between nested fields; a tuple where names may have dots. least:
    whether the smallest value is best. scale: from the unit in the row to the unit that is shown;
    without it values keep their type.
    """

    path: str | tuple[str, ...]
    least: bool = False
    scale: float = 1.0

    def of(self, row: Json) -> Any:
        value: Any = row
        for field in self.path.split(".") if isinstance(self.path, str) else self.path:
            value = value[field]
        return value if self.scale == 1 else self.scale * value

    def best(self, rows: Sequence[Json]) -> Any:
        return (min if self.least else max)(map(self.of, rows))


class Part(NamedTuple):
    """A part of the score. rule: what it is, in words. points: the most it can give. metric: each
    row gets its ratio to the best row; or a function that gives the share of the points."""

    rule: str
    points: float
    metric: Metric | Callable[[Json], float]

    def of(self, row: Json, rows: Sequence[Json]) -> float:
        if not isinstance(self.metric, Metric):
            return self.points * self.metric(row)
        own, best = self.metric.of(row), self.metric.best(rows)
        return self.points * best / own if self.metric.least else self.points * own / best


def add_scores(rows: Sequence[Json], parts: Mapping[str, Part]) -> None:
    """Adds "score_parts" and their sum, "score", to every row."""
    for row in rows:
        row["score_parts"] = {name: part.of(row, rows) for name, part in parts.items()}
        row["score"] = sum(row["score_parts"].values())


def winners(rows: Sequence[Json], categories: Mapping[str, Metric]) -> Json:
    """By category the best value, and all systems that have it."""
    found = {}
    for name, metric in categories.items():
        best = metric.best(rows)
        systems = [row["system"] for row in rows if metric.of(row) == best]
        found[name] = {"system": ", ".join(systems), "value": best}
    return found
