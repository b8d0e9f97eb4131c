"""What the leaderboards of all protocols have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from slam_jax.language_models import SYSTEMS
from slam_jax.rocket.page import Bullets, Table
from slam_jax.rocket.tasks import Json

SCHEMA_VERSION = 1  # of leaderboard.schema.json


def head(about: Json) -> Json:
    """The first fields of a board: protocol, settings, data, limits, machine."""
    return {"schema_version": SCHEMA_VERSION, **about}


def row_head(name: str, done: Mapping[str, Json], needed: Iterable[str]) -> Json:
    """The first fields of a system's row: who it is, and whether the tasks it needs were done."""
    reasons = [done[label]["reason"] for label in needed if "reason" in done[label]]
    row: Json = {"system": name, "title": SYSTEMS[name].title}
    if reasons:
        return {**row, "status": "failed", "reason": reasons[0]}
    return {**row, "status": "ok"}


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
