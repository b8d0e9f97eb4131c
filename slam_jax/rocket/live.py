"""The table that is seen while systems are measured: in place on a terminal, lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table


class LiveTable:
    """One row a system; `update` may be called from any thread.

    total: tasks in all; the remaining time is that of those done so far, carried on.
    """

    def __init__(self, systems: list[str], total: int, console: Console | None = None):
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._state: dict[str, tuple[float, str]] = dict.fromkeys(systems, (0.0, "waits"))
        self._total, self._done, self._start = total, 0, time.monotonic()
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, system: str, share: float, text: str) -> None:
        self._state[system] = (share, text)

    def finished(self, system: str, text: str) -> None:
        """A task of a system is done; without a terminal it is a line."""
        self._done += 1
        self.update(system, 1.0, text)
        if not self._console.is_terminal:
            progress = f"{self._done}/{self._total}"
            self._console.print(f"{progress} {system}: {text}{self._remaining()}", markup=False)

    def _remaining(self) -> str:
        if not 0 < self._done < self._total:
            return ""
        each = (time.monotonic() - self._start) / self._done
        minutes, seconds = divmod(round(each * (self._total - self._done)), 60)
        return f" · ETA {minutes}:{seconds:02d}"

    def _table(self) -> Any:
        table = Table(
            "system", "", "", title=f"{self._done} of {self._total} tasks{self._remaining()}"
        )
        for system, (share, text) in self._state.items():
            table.add_row(system, ProgressBar(total=1.0, completed=share, width=16), text)
        return table
