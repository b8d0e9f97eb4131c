"""What a protocol asks of the engine: tasks, each for one process, and what they are told."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from slam_jax.rocket.page import Page

Json = dict[str, Any]


class Task(NamedTuple):
    """A system and what is to be measured of it.

    label: under which the figures are kept. what: of `worker.TASKS`. weight: how long it takes,
    beside others. optional: a system whose task fails goes on. timed: others that run beside it
    would change its figures.
    """

    system: str
    label: str
    what: str
    weight: float = 1.0
    optional: bool = False
    timed: bool = True


class Impossible(Exception):
    """There is nothing that a task could be given; says why."""


@runtime_checkable
class Comparison(Protocol):
    """One protocol, with its settings.

    models: the systems compared. settings: as workers are given them. data: what figures depend on
    besides. tasks: in the order in which they are done, as far as they follow from the figures so
    far, by system and label. arguments: of a task, given the figures of
    its system so far by label; raises Impossible. board: of figures by system and label.
    """

    name: str
    models: Sequence[str]
    settings: Json
    data: Json

    def tasks(self, results: Mapping[str, Mapping[str, Json]]) -> list[Task]: ...

    def arguments(self, task: Task, done: Mapping[str, Json]) -> Json: ...

    def board(self, about: Json, results: Mapping[str, Mapping[str, Json]]) -> Json: ...

    def page(self, board: Json) -> Page: ...


def failure(tasks: Sequence[Task], done: Mapping[str, Json]) -> str | None:
    """Why a system has no figures, of its own tasks; None where it has or may still have them."""
    for task in tasks:
        reason = done.get(task.label, {}).get("reason")
        if reason is not None and not task.optional:
            return reason
    return None


def plain(settings: Any) -> Json:
    """A dataclass as JSON has it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))
