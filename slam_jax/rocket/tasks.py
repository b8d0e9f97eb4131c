"""Tasks: what a protocol asks the engine to measure, each in a process of its own."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slam_jax.errors import require, require_count

Json = dict[str, Any]
# Progress of a task: the share that is done, and a few words.
Report = Callable[[float, str], None]


class Task(NamedTuple):
    """One measurement of one system.

    label: the name under which its figures are stored. what: its function, a key of
    `worker.TASKS`. weight: its expected duration, relative to other tasks. optional: if it fails,
    the other tasks of the system still run. timed: it must run alone, because processes beside it
    would change its figures.
    """

    system: str
    label: str
    what: str
    weight: float = 1.0
    optional: bool = False
    timed: bool = True


class Impossible(Exception):
    """A task has no valid arguments; the message says why."""


def failure(tasks: Sequence[Task], done: Mapping[str, Json]) -> str | None:
    """Why a system failed, from its tasks and their figures; None if it did not (yet)."""
    for task in tasks:
        reason = done.get(task.label, {}).get("reason")
        if reason is not None and not task.optional:
            return reason
    return None


def plain(settings: Any) -> Json:
    """A dataclass as JSON stores it: with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def check_distinct(settings: Any, field: str) -> None:
    """Stores a field of a frozen dataclass as a tuple; raises ConfigError unless it has values and
    all are different."""
    values = tuple(getattr(settings, field))
    object.__setattr__(settings, field, values)
    require(0 < len(values) == len(set(values)), field, values, "some, all different")


def check_seeds(settings: Any) -> None:
    """The same for the field `seeds`, whose values must be seeds."""
    check_distinct(settings, "seeds")
    for seed in settings.seeds:
        require_count("seeds", seed, least=0, most=2**32 - 1)
