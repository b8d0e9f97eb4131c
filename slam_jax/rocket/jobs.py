"""Runs one task in a process of its own, so that a system that fails costs one row.

The process is `python -m slam_jax.rocket.jobs TASK PARENT`. TASK: JSON of {"function":
"module:name", "system", "settings", "arguments"}. PARENT: the process that started it; when that
ends, it ends too. It prints lines of JSON: [share, text] for progress, {"figures": ...} for all
figures so far.
"""

import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil

from slam_jax.rocket.tasks import Json, Report, Task
from slam_jax.runtime.compile_cache import enable_compile_cache

_POLL_SECONDS = 0.1


def run_job(
    task: Task,
    settings: Json,
    limits: Mapping[str, Any],
    *,
    progress: Report,
    stop: threading.Event,
    cores: Sequence[int] = (),
) -> Json:
    """Runs a task and waits for it. Its process is ended when it exceeds the limits "memory_gib"
    and "seconds", and when `stop` is set. cores: those that it may use; () = all.

    Returns its figures, as far as it got, and under "reason" why it did not finish.
    """
    function = f"{task.function.__module__}:{task.function.__qualname__}"
    job = {"function": function, "system": task.system, "settings": settings}
    job = json.dumps({**job, "arguments": {**task.arguments}})
    figures: Json = {}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages,
        subprocess.Popen(
            [sys.executable, "-m", "slam_jax.rocket.jobs", job, str(os.getpid())],
            stdout=subprocess.PIPE,
            stderr=messages,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUTF8": "1"},
        ) as process,
    ):
        if cores:  # before the process starts threads, which inherit them
            os.sched_setaffinity(process.pid, cores)
        given = (process.stdout, progress, figures)
        reader = threading.Thread(target=_read, args=given, daemon=True)
        reader.start()
        try:
            reason = _watch(process, limits["memory_gib"], limits["seconds"], stop)
        finally:
            process.kill()  # does nothing if it has ended
            reader.join()
        code = process.returncode
        if reason is None and code:
            messages.seek(0)
            lines = [line for line in map(str.strip, messages) if line] or ["no message"]
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            reason = f"ended with {how}: {lines[-1][:200]}"
    return figures if reason is None else {**figures, "reason": reason}


def _watch(
    process: subprocess.Popen, memory_gib: float, seconds: float, stop: threading.Event
) -> str | None:
    """Waits until the process ends, or must be ended; returns why it must."""
    end, watched = time.monotonic() + seconds, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory = watched.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        if memory > memory_gib * 2**30:
            return f"took more than {memory_gib:g} GiB of memory"
        if time.monotonic() > end:
            return f"took more than {seconds:g} s"
        if stop.is_set():
            return "was stopped"
        time.sleep(_POLL_SECONDS)
    return None


def _read(lines: Iterable[str], progress: Report, figures: Json) -> None:
    """Reports the lines that are progress and stores the figures; libraries print other lines."""
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        match value:
            case [int() | float() as share, str() as text]:
                progress(share, text)
            case {"figures": dict() as found}:
                figures.update(found)


def main() -> None:
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    enable_compile_cache()
    task: Json = json.loads(sys.argv[1])
    function = pkgutil.resolve_name(task["function"])
    settings = typing.get_type_hints(function)["settings"](**task["settings"])

    def report(share: float, text: str) -> None:
        _send([round(share, 3), text])

    figures = function(task["system"], settings, report, **task["arguments"])
    for each in figures if isinstance(figures, Iterator) else [figures]:
        _send({"figures": each})


def _send(value: Any) -> None:
    """Prints a line of its own, even after half a line that a library has printed."""
    print("\n" + json.dumps(value, allow_nan=False), flush=True)


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, which could not do it if it was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
