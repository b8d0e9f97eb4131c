"""The progress of a run on the console: a bar on a terminal, plain lines elsewhere."""

import contextlib
import io
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from slam_jax.runtime.distributed import is_first_process
from slam_jax.runtime.memory import peak_memory

PATIENCE = "this can take minutes for a large model"
_WINDOW = 50  # updates over which rates are averaged


class _Point(NamedTuple):
    """The counts up to a moment; seconds of training alone."""

    seconds: float
    steps: int
    examples: int = 0
    tokens: int = 0
    flops: int = 0


class Progress:
    """Shows step, loss, rates and the remaining time of a run.

    Rates are means over the last steps, without the time of `paused` and `compiling`.

    total_steps, first_step: at which the run ends, and from which it resumes. every: steps between
    two plain lines, where there is no terminal. shown: False = print nothing. console: where to
    print; by default standard output. peak_flops: operations a second of all devices, None = not
    known.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        every: int = 100,
        shown: bool = True,
        console: Console | None = None,
        peak_flops: float | None = None,
    ):
        self._total, self._peak_flops = total_steps, peak_flops
        self._paused = self._compiled = 0.0  # seconds
        self._every = every
        self._console = console or _make_console(shown)
        self._recent: deque[_Point] = deque(maxlen=_WINDOW + 1)
        self._start = _Point(time.monotonic(), first_step)
        self._recent.append(self._start)
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
        self,
        step: int,
        *,
        loss: float,
        examples: int = 0,
        tokens: int = 0,
        flops: int = 0,
        view: str = "",
    ) -> None:
        """Shows a finished step. examples, tokens, flops: their numbers since the last update."""
        last, now = self._recent[-1], time.monotonic() - self._paused
        seen = last.examples + examples, last.tokens + tokens, last.flops + flops
        self._recent.append(_Point(now, step, *seen))
        status = self._status(loss, view)
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._total):
            self.log(f"step {step}/{self._total} · {status}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time in this context counts for no rate."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    @contextlib.contextmanager
    def compiling(self, view: str) -> Iterator[None]:
        """The same, and says how long it took to compile the step of a view.

        The first time it also says what is being waited for.
        """
        if not self._compiled:
            self.log(f"compiling the training step; {PATIENCE}")
        before = self._paused
        with self.paused():
            yield
        self._compiled += self._paused - before
        self.log(f"view {view}: compiled in {self._paused - before:.1f} s")

    def speed(self) -> dict[str, float]:
        """What the metrics file says of the last steps.

        step_seconds, examples_per_second, tokens_per_second. compile_seconds: in sum since the
        start of this process. mfu: model FLOP utilisation, 0 to 1, where the peak is known.
        peak_memory_bytes: where devices say it.
        """
        spent = self._spent()
        found: dict[str, float] = {
            "step_seconds": spent.seconds / max(spent.steps, 1),
            "examples_per_second": spent.examples / spent.seconds,
            "tokens_per_second": spent.tokens / spent.seconds,
            "compile_seconds": self._compiled,
        }
        if self._peak_flops:
            found["mfu"] = spent.flops / spent.seconds / self._peak_flops
        memory = peak_memory()
        return found if memory is None else {**found, "peak_memory_bytes": float(memory)}

    def summary(self) -> str:
        """What was done since the start of this process: steps, time, examples and tokens."""
        end = self._recent[-1]
        took = _clock(time.monotonic() - self._start.seconds)
        parts = [f"{end.steps - self._start.steps:,} steps in {took}"]
        return ", ".join([*parts, f"{end.examples:,} examples", f"{end.tokens:,} tokens"])

    def _spent(self) -> _Point:
        """The differences over the last steps."""
        old, new = self._recent[0], self._recent[-1]
        seconds, *counts = (b - a for a, b in zip(old, new, strict=True))
        return _Point(max(seconds, 1e-9), *map(int, counts))

    def log(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        _print_line(self._console, text)

    def _status(self, loss: float, view: str) -> str:
        spent, speed = self._spent(), self.speed()
        parts = [f"view {view}"] if view else []
        parts.append(f"loss {loss:.3f}")
        parts += [f"{_rate(speed['examples_per_second'])} examples/s"] if spent.examples else []
        parts += [f"{_rate(speed['tokens_per_second'])} tokens/s"] if spent.tokens else []
        parts += [f"MFU {100 * speed['mfu']:.0f}%"] if "mfu" in speed else []
        if "peak_memory_bytes" in speed:
            parts.append(f"{speed['peak_memory_bytes'] / 2**30:.1f} GiB")
        if spent.steps:
            left = self._total - self._recent[-1].steps
            parts.append(f"ETA {_clock(left * speed['step_seconds'])}")
        return _writable(self._console, " · ".join(parts))


def log_early(text: str) -> None:
    """Prints a line in the first process, as `Progress.log` does, where there is no `Progress`."""
    _print_line(_make_console(is_first_process()), text)


def _make_console(shown: bool) -> Console:
    """Standard output, where failed writes are ignored. shown: False = print nothing."""
    stream: Any = _FailSafe(sys.stdout)
    return Console(file=stream, highlight=False, soft_wrap=True, quiet=not shown)


def _print_line(console: Console, text: str) -> None:
    console.print(_writable(console, text), markup=False)


def _writable(console: Console, text: str) -> str:
    """The text with characters replaced that the encoding of the terminal lacks."""
    encoding = console.encoding
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
