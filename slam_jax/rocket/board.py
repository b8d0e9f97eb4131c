"""What the leaderboards of all protocols have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from slam_jax.language_models import SYSTEMS
from slam_jax.rocket.page import Bullets, Table
from slam_jax.rocket.tasks import Json

SCHEMA_VERSION = 1  # of leaderboard.schema.json
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


def resamplings(seeds: int, units: int) -> Float[np.ndarray, "R seeds units"]:
    """How often each seed and each unit, a document or a scene, is drawn: a bootstrap over both,
    the same for all systems, so that differences are paired.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in (seeds, units)]
    return np.einsum("rs,ru->rsu", *drawn).astype(np.float64)


def interval(mean: float, resampled: Float[np.ndarray, "R"]) -> Json:
    """A figure with its 95% interval."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def winner(rows: Sequence[Json], value: Callable[[Json], float], sign: int) -> Json:
    """The system with the highest value (sign 1) or the lowest (-1), and all that share it."""
    best = max(rows, key=lambda row: sign * value(row))
    tied = [row["system"] for row in rows if value(row) == value(best)]
    return {"system": ", ".join(tied), "value": value(best)}


def describe_machine_of(board: Json) -> str:
    """The machine in half a sentence."""
    machine: dict[str, Any] = board["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, device "
        f"{machine['device']}; Python {machine['python']}, jax {machine['jax']}, slam_jax "
        f"{machine['slam_jax']}."
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
