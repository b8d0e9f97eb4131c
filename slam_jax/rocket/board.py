"""What all protocols have in common: from tasks and their figures to a leaderboard."""

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from slam_jax.language_models import SYSTEMS
from slam_jax.rocket.metrics import Part
from slam_jax.rocket.page import Page, make_page
from slam_jax.rocket.tasks import Json, Results, Task, failure, plain

SCHEMA_VERSION = 2  # of leaderboard.schema.json


class Comparison(abc.ABC):
    """A protocol with its settings.

    name: also of the template of its page. score: parts of the score, if there is one. ranked:
    whether `judge` sorts the rows; otherwise they are in the order of the models. models: the
    systems that are compared. settings: JSON, given to every worker. data: what else the figures
    depend on.
    """

    name: ClassVar[str]
    score: ClassVar[Mapping[str, Part]] = {}
    ranked: ClassVar[bool] = True

    def __init__(self, options: Any, models: Sequence[str], workdir: str | Path):
        self.options, self.settings, self.models = options, plain(options), tuple(models)
        self.data: Json = {}

    @property
    def identity(self) -> Json:
        """What figures must share to be comparable."""
        return {"protocol": self.name, "settings": self.settings, "data": self.data}

    @abc.abstractmethod
    def tasks(self, results: Results) -> list[Task]:
        """All tasks in the order in which they run, as far as the results so far determine them."""

    def known(self, name: str) -> Json:
        """The fields of a system that do not depend on its tasks."""
        return {}

    @abc.abstractmethod
    def row(self, name: str, done: Mapping[str, Json]) -> Json:
        """The fields of a system whose tasks have all succeeded."""

    @abc.abstractmethod
    def judge(self, rows: list[Json]) -> Json:
        """Sorts and ranks the rows in place; returns the winner of each category."""

    def summary(self, rows: Sequence[Json], measured: Sequence[Json]) -> Json:
        """More fields of the board; `measured` are the rows that did not fail."""
        return {}

    def board(self, about: Json, results: Results) -> Json:
        """The leaderboard. about: protocol, settings, data, limits and machine."""
        tasks, rows = self.tasks(results), []
        for name, done in results.items():
            title = SYSTEMS[name].title if name in SYSTEMS else name.replace("_", " ")
            reason = failure(name, tasks, done)
            row: Json = {"system": name, "title": title, **self.known(name)}
            if reason is None:
                rows.append({**row, "status": "ok", **self.row(name, done)})
            else:
                rows.append({**row, "status": "failed", "reason": reason})
        measured = [row for row in rows if row["status"] == "ok"]
        winners = self.judge(measured) if measured else {}
        board: Json = {"schema_version": SCHEMA_VERSION, **about}
        if self.score:
            board["score_rule"] = {name: part.rule for name, part in self.score.items()}
        if self.ranked:
            rows = measured + [row for row in rows if row["status"] != "ok"]
        summary = self.summary(rows, measured)
        return {**board, "rows": rows, "category_winners": winners, **summary}

    def page(self, board: Json) -> Page:
        return make_page(self.name, board)

    def each(
        self, label: str, function: Callable[..., Any], weight: float = 1.0, **kw: Any
    ) -> list[Task]:
        """The same task of every model."""
        return [Task(name, label, function, weight, **kw) for name in self.models]

    def visits(self, function: Callable[..., Any], weight: float, **kw: Any) -> list[Task]:
        """Timing tasks: every model is measured in `rounds` processes, and models take turns."""
        labels = [f"timing {i + 1}" for i in range(self.options.rounds)]
        return [task for label in labels for task in self.each(label, function, weight, **kw)]

    def timings(self, done: Mapping[str, Json]) -> list[Json]:
        """The figures of a system from all timing tasks."""
        return [done[f"timing {i + 1}"] for i in range(self.options.rounds)]
