"""The table that is seen while systems are measured: in place on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from slam_jax.rocket.tasks import Task


class LiveTable:
    """One row a system; `update` may be called from any thread.

    The remaining time is that of the tasks done, carried on by weight.
    """

    def __init__(self, systems: Sequence[str], console: Console | None = None):
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._state: dict[str, tuple[float, str]] = dict.fromkeys(systems, (0.0, "waits"))
        self._left: Sequence[Task] = ()
        self._done, self._weight_done, self._start = 0, 0.0, time.monotonic()
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, task: Task, share: float, text: str) -> None:
        self._state[task.system] = (share, f"{task.label}: {text}")

    def finished(
        self, task: Task, reason: str | None, seconds: float, left: Sequence[Task]
    ) -> None:
        """A task is done, and so many are left; without a terminal it is a line."""
        self._left, self._done = left, self._done + 1
        self._weight_done += task.weight
        text = reason or f"{seconds:.0f} s"
        self.update(task, 1.0, text)
        if not self._console.is_terminal:
            progress = f"{self._done}/{self._done + len(left)} {task.system}, {task.label}: {text}"
            self._console.print(progress + self._remaining(), markup=False)

    def _remaining(self) -> str:
        if not self._left or not self._done:
            return ""
        each = (time.monotonic() - self._start) / self._weight_done
        left = round(each * sum(task.weight for task in self._left))
        hours, minutes, seconds = left // 3_600, left // 60 % 60, left % 60
        return (
            " · ETA " + (f"{hours}:{minutes:02d}:" if hours else f"{minutes}:") + f"{seconds:02d}"
        )

    def _table(self) -> Any:
        title = f"{self._done} of {self._done + len(self._left)} tasks{self._remaining()}"
        table = Table("system", "", "", title=title)
        for system, (share, text) in self._state.items():
            table.add_row(system, ProgressBar(total=1.0, completed=share, width=16), text)
        return table
