"""Progress of a comparison: a table that changes in place on a terminal, else a line per task."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from slam_jax.rocket.tasks import Task


class LiveTable:
    """One row per system; `update` may be called from any thread.

    The remaining time is estimated from the weights of the tasks.
    """

    def __init__(self, systems: Sequence[str], console: Console | None = None):
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._state: dict[str, tuple[float, str]] = dict.fromkeys(systems, (0.0, "waits"))
        self._remaining: Sequence[Task] = ()
        self._done, self._weight_done, self._start = 0, 0.0, time.monotonic()
        self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=4)

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, task: Task, share: float, text: str) -> None:
        self._state[task.system] = (share, f"{task.label}: {text}")

    def finished(
        self, task: Task, reason: str | None, seconds: float, remaining: Sequence[Task]
    ) -> None:
        """Shows that a task has finished or failed, and estimates the remaining time."""
        self._remaining, self._done = remaining, self._done + 1
        self._weight_done += task.weight
        text = reason or f"{seconds:.0f} s"
        self.update(task, 1.0, text)
        if not self._console.is_terminal:
            count = f"{self._done}/{self._done + len(remaining)}"
            line = f"{count} {task.system}, {task.label}: {text}{self._eta()}"
            self._console.print(line, markup=False)

    def _eta(self) -> str:
        if not self._remaining or not self._done:
            return ""
        rate = (time.monotonic() - self._start) / self._weight_done
        minutes, seconds = divmod(round(rate * sum(task.weight for task in self._remaining)), 60)
        hours, minutes = divmod(minutes, 60)
        return f" · ETA {f'{hours}:{minutes:02d}' if hours else minutes}:{seconds:02d}"

    def table(self) -> Table:
        title = f"{self._done} of {self._done + len(self._remaining)} tasks{self._eta()}"
        table = Table("system", "", "", title=title)
        for system, (share, text) in self._state.items():
            table.add_row(system, ProgressBar(total=1.0, completed=share, width=16), text)
        return table
