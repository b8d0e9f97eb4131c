"""Runs one task in a process of its own, so that a system that fails costs one row."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from slam_jax.errors import write_whole
from slam_jax.rocket.tasks import Json, Report

_POLL_SECONDS = 0.1


def run_job(
    what: str,
    system: str,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    arguments: Mapping[str, Any],
    memory_gib: float,
    seconds: float,
    progress: Report,
    stop: threading.Event,
    cores: Sequence[int] = (),
) -> Json:
    """Runs a task of `slam_jax.rocket.worker` and waits for it. The process is ended when it
    exceeds its memory or its time, and when `stop` is set. cores: those that it may use; () = all.

    Returns its figures, as far as it got, and under "reason" why it did not finish.
    """
    job, out = folder / f"{what}.{system}.job.json", folder / f"{what}.{system}.out.json"
    given = {"what": what, "system": system, "settings": {**settings}, "arguments": {**arguments}}
    write_whole(job, json.dumps(given))
    out.unlink(missing_ok=True)
    last_lines = deque(maxlen=20)
    process = subprocess.Popen(
        [sys.executable, "-m", "slam_jax.rocket.worker", str(job), str(out), str(os.getpid())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    if cores:  # before the process starts threads, which inherit them
        os.sched_setaffinity(process.pid, cores)
    with process:
        readers = [
            _start_thread(_read_progress, process.stdout, progress),
            _start_thread(last_lines.extend, process.stderr),
        ]
        try:
            reason = _watch(process, memory_gib, seconds, stop)
        finally:
            process.kill()  # does nothing if it has ended
            for reader in readers:
                reader.join()
            job.unlink(missing_ok=True)
    if reason is None and process.returncode:
        last = next((line.strip() for line in reversed(last_lines) if line.strip()), "no message")
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        reason = f"ended with {how}: {last[:200]}"
    figures = json.loads(out.read_text()) if out.exists() else {}
    out.unlink(missing_ok=True)
    return figures if reason is None else {**figures, "reason": reason}


def _start_thread(function: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


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


def _read_progress(lines: Iterable[str], progress: Report) -> None:
    """Reports the lines that are progress; libraries print others."""
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:
            continue
        match report:
            case [int() | float() as share, str() as text]:
                progress(share, text)
