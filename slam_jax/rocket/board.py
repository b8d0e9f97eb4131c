"""What the leaderboards of all protocols have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from slam_jax.language_models import SYSTEMS
from slam_jax.rocket.page import Bullets, Table
from slam_jax.rocket.tasks import Json

SCHEMA_VERSION = 2  # of leaderboard.schema.json
RESAMPLES = 2_000


def head(about: Json) -> Json:
    """The first fields of a board: protocol, settings, data, limits, machine."""
    return {"schema_version": SCHEMA_VERSION, **about}


def row_head(name: str, done: Mapping[str, Json], needed: Iterable[str]) -> Json:
    """The first fields of a system's row: who it is, and whether the tasks it needs were done."""
    reasons = [done[label]["reason"] for label in needed if "reason" in done[label]]
    title = SYSTEMS[name].title if name in SYSTEMS else name.replace("_", " ")
    row: Json = {"system": name, "title": title}
    if reasons:
        return {**row, "status": "failed", "reason": reasons[0]}
    return {**row, "status": "ok"}


Weights = Float[np.ndarray, "_ seeds units"]


def interval(shape: tuple[int, int], figure: Callable[[Weights], Float[np.ndarray, "_"]]) -> Json:
    """A figure with its 95% interval, of `shape`: seeds and units, which are documents or scenes.

    figure: of how often each unit counts with each seed. A difference is paired, since both sides
    are given the same weights.

    Seeds and units are two causes of chance, and the distances that they reach from the mean add up
    as the sides of a right angle do: over units a bootstrap of 2,000 resamplings; over seeds, too
    few for one, t s / sqrt(S), with s the standard deviation of the S seeds' figures and t that of
    Student for S - 1 degrees of freedom. Of a single seed, what others would have given is not
    known, and not in it.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
    """
    seeds, units = shape
    mean = float(figure(np.ones((1, seeds, units)))[0])
    drawn = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
    every = figure(np.repeat(drawn[:, None], seeds, axis=1).astype(np.float64))
    reach = np.quantile(every, [0.025, 0.975]) - mean
    if seeds > 1:
        own = figure(np.repeat(np.eye(seeds)[..., None], units, axis=-1))
        reach = np.hypot(reach, stdtrit(seeds - 1, 0.975) * np.std(own, ddof=1) / np.sqrt(seeds))
    else:
        reach = np.abs(reach)
    return {"mean": mean, "low": float(mean - reach[0]), "high": float(mean + reach[1])}


def winner(rows: Sequence[Json], value: Callable[[Json], float], sign: int) -> Json:
    """The system with the highest value (sign 1) or the lowest (-1), and all that share it."""
    best = max(rows, key=lambda row: sign * value(row))
    tied = [row["system"] for row in rows if value(row) == value(best)]
    return {"system": ", ".join(tied), "value": value(best)}


def describe_machine_of(board: Json) -> str:
    """The machine in half a sentence."""
    machine: dict[str, Any] = board["machine"]
    measured: dict[str, Any] = board["measured"]
    codes = measured["code"]
    days = dict.fromkeys(measured[end][:10] for end in ("first", "last"))
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, device "
        f"{machine['device']}; Python {machine['python']}, jax {machine['jax']}, slam_jax "
        f"{' and '.join(codes)}; measured {' to '.join(days)}."
    )


def winners_table(board: Json) -> Table:
    """The best of each category."""
    winners = board["category_winners"].items()
    cells = [(name, each["system"], f"{each['value']:,.4g}") for name, each in winners]
    return Table("Winners", ("category", "system", "value"), cells)


def score_bullets(board: Json) -> Bullets:
    """The rule, a part a line."""
    rule = [f"{part}: {rule}" for part, rule in board["score_rule"].items()]
    return Bullets("How the score is made", rule, "Of 100 points, the same rule for every row.")
