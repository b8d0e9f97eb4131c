"""The progress of a run on the console: a bar on a terminal, plain lines elsewhere."""

import contextlib
import io
import sys
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

_WINDOW = 50  # updates over which rates are averaged


class Progress:
    """Shows step, loss, rates and the remaining time of a run.

    total_steps, first_step: at which the run ends, and from which it resumes. every: steps between
    two plain lines, where there is no terminal. shown: False = print nothing. console: where to
    print; by default standard output.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        every: int = 100,
        shown: bool = True,
        console: Console | None = None,
    ):
        self._total = total_steps
        self._every = every
        self._console = console or Console(
            file=_FailSafe(sys.stdout),  # pyright: ignore[reportArgumentType]
            highlight=False,
            soft_wrap=True,
            quiet=not shown,
        )
        # Seconds, steps, examples, tokens.
        self._recent: deque[tuple[float, int, int, int]] = deque(maxlen=_WINDOW + 1)
        self._recent.append((time.monotonic(), first_step, 0, 0))
        # On a narrow terminal the status wraps; the other columns keep their width.
        width = len(f"step {total_steps}/{total_steps}")
        self._bar = Bar(
            TextColumn("step {task.completed}/{task.total}", table_column=Column(min_width=width)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(ratio=1)),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(
        self, step: int, *, loss: float, examples: int = 0, tokens: int = 0, view: str = ""
    ) -> None:
        """Shows a finished step. examples, tokens: their numbers since the last update."""
        _, _, seen_examples, seen_tokens = self._recent[-1]
        now = time.monotonic()
        self._recent.append((now, step, seen_examples + examples, seen_tokens + tokens))
        status = self._status(loss, view)
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._total):
            self.log(f"step {step}/{self._total} · {status}")

    def log(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(self._writable(text), markup=False)

    def _status(self, loss: float, view: str) -> str:
        old, new = self._recent[0], self._recent[-1]
        seconds, steps, examples, tokens = (b - a for a, b in zip(old, new, strict=True))
        seconds = max(seconds, 1e-9)
        parts = [f"view {view}"] if view else []
        parts.append(f"loss {loss:.3f}")
        parts += [f"{_rate(examples / seconds)} examples/s"] if examples else []
        parts += [f"{_rate(tokens / seconds)} tokens/s"] if tokens else []
        if steps:
            parts.append(f"ETA {_clock((self._total - new[1]) * seconds / steps)}")
        return self._writable(" · ".join(parts))

    def _writable(self, text: str) -> str:
        """The text with characters replaced that the encoding of the terminal lacks."""
        encoding = self._console.encoding
        if not encoding.startswith("utf"):
            text = text.replace("·", "|")
        return text.encode(encoding, "replace").decode(encoding)


class _FailSafe:
    """A stream that ignores failed writes, so that a run survives the end of its terminal, a closed
    pipe, and a full disk."""

    def __init__(self, stream: Any):
        self._stream = stream or io.StringIO()  # a process may have no standard output

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _rate(value: float) -> str:
    if value >= 1e4:
        return f"{value:.1e}".replace("e+0", "e")
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
