"""Tasks: what a protocol asks the engine to measure, each in a process of its own."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slam_jax.errors import require, require_count

Json = dict[str, Any]
Results = Mapping[str, Mapping[str, Json]]  # figures by system and label of the task
# Progress of a task: the share that is done, and a few words.
Report = Callable[[float, str], None]


class Task(NamedTuple):
    """One measurement of one system.

    label: the name under which its figures are stored. function: called in the process with the
    system, the settings, a `Report` and the arguments (JSON); it returns the figures, or yields the
    figures so far if it may fail halfway. weight: its expected duration, relative to other tasks.
    optional: if it fails, the other tasks of the system still run. timed: it must run alone,
    because processes beside it would change its figures. impossible: why it cannot be started.
    """

    system: str
    label: str
    function: Callable[..., Any]
    weight: float = 1.0
    arguments: Mapping[str, Any] = {}
    optional: bool = False
    timed: bool = True
    impossible: str | None = None


def failure(system: str, tasks: Sequence[Task], done: Mapping[str, Json]) -> str | None:
    """Why a system failed, from all tasks and its figures; None if it did not (yet)."""
    for task in tasks:
        reason = done.get(task.label, {}).get("reason")
        if task.system == system and not task.optional and reason is not None:
            return reason
    return None


def plain(settings: Any) -> Json:
    """A dataclass as JSON stores it: with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def check_settings(settings: Any, zero: Sequence[str] = (), large: Sequence[str] = ()) -> None:
    """Raises ConfigError unless the numbers of a frozen dataclass are positive; fields of `zero`
    may be 0. Sequences must have values, all different, and become tuples.

    Whole numbers are at most 2**20; those of `large` at most 2**32 - 1.
    """
    for field in dataclasses.fields(settings):
        name, values = field.name, (getattr(settings, field.name),)
        if field.type in (Sequence[int], Sequence[float]):
            values = tuple(*values)
            object.__setattr__(settings, name, values)
            require(0 < len(values) == len(set(values)), name, values, "some, all different")
        for value in values:
            if field.type in (int, Sequence[int]):
                most = 2**32 - 1 if name in large else 1 << 20
                require_count(name, value, least=0 if name in zero else 1, most=most)
            elif field.type in (float, Sequence[float]):
                expected = "0 or more" if name in zero else "a number above 0"
                require(value > 0 or (name in zero and value == 0), name, value, expected)
