"""Progress of a comparison: a table that changes in place on a terminal, else a line per task."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from slam_jax.rocket.tasks import Task


class LiveTable:
    """One row per system, and one for all tasks; `update` may be called from any thread.

    The remaining time is estimated from the weights of the tasks.
    """

    def __init__(self, systems: Sequence[str], console: Console | None = None):
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._done, self._weight_done, self._start = 0, 0.0, time.monotonic()
        name, text = (
            TextColumn(form, markup=False) for form in ("{task.description}", "{task.fields[text]}")
        )
        self._progress = Progress(name, BarColumn(16), text, console=self._console)
        add_row = partial(self._progress.add_task, total=1.0, text="waits")
        self._rows = {system: add_row(system) for system in systems}
        self._all = add_row("all")

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, task: Task, share: float, text: str) -> None:
        row = self._rows[task.system]
        self._progress.update(row, completed=share, text=f"{task.label}: {text}")

    def finished(
        self, task: Task, reason: str | None, seconds: float, remaining: Sequence[Task]
    ) -> None:
        """Shows that a task has finished or failed, and estimates the remaining time."""
        text = reason or f"{seconds:.0f} s"
        self.update(task, 1.0, text)
        self._done, self._weight_done = self._done + 1, self._weight_done + task.weight
        weight, count = sum(each.weight for each in remaining), self._done + len(remaining)
        left = round((time.monotonic() - self._start) * weight / self._weight_done)
        eta = f" · ETA {timedelta(seconds=left)}" if remaining else ""
        share = self._weight_done / (self._weight_done + weight)
        all_text = f"{self._done} of {count} tasks{eta}"
        self._progress.update(self._all, completed=share, text=all_text)
        if not self._console.is_terminal:
            line = f"{self._done}/{count} {task.system}, {task.label}: {text}{eta}"
            self._console.print(line, markup=False)
