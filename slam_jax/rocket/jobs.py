"""Runs each system in a process of its own, so that one that fails costs one row."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from slam_jax.errors import write_whole

_EVERY_S = 0.1


def run_job(
    what: str,
    system: str,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    arguments: Mapping[str, Any],
    memory_gib: float,
    seconds: float,
    progress: Callable[[float, str], None],
    stop: threading.Event,
    cores: Sequence[int] = (),
) -> dict[str, Any]:
    """Waits for one task of `slam_jax.rocket.worker`; ends it at its limit of memory or time, and
    where `stop` is set. cores: on which it runs, where the system can say so; none = all.

    Returns its figures, as far as it came, and under "reason" why it did not come further.
    """
    job, out = folder / f"{what}.{system}.job.json", folder / f"{what}.{system}.out.json"
    asked = {"what": what, "system": system}
    asked |= {"settings": dict(settings), "arguments": dict(arguments)}
    write_whole(job, json.dumps(asked))
    out.unlink(missing_ok=True)
    last_words = deque(maxlen=20)
    process = subprocess.Popen(
        [sys.executable, "-m", "slam_jax.rocket.worker", str(job), str(out), str(os.getpid())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    if cores:  # long before it starts threads, which then keep to them
        os.sched_setaffinity(process.pid, cores)
    readers = [
        threading.Thread(target=_read_progress, args=(process.stdout, progress), daemon=True),
        threading.Thread(target=last_words.extend, args=(process.stderr,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        reason = _watch(process, memory_gib, seconds, stop)
    finally:
        if process.poll() is None:  # a limit, or whoever waits was stopped
            process.kill()
        process.wait()
        for reader, pipe in zip(readers, (process.stdout, process.stderr), strict=True):
            reader.join()
            pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        job.unlink(missing_ok=True)
    if reason is None and process.returncode:
        said = next((line.strip() for line in reversed(last_words) if line.strip()), "no word")
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        reason = f"ended with {how}: {said[:200]}"
    figures = json.loads(out.read_text()) if out.exists() else {}
    out.unlink(missing_ok=True)
    return figures if reason is None else {**figures, "reason": reason}


def _watch(
    process: subprocess.Popen, memory_gib: float, seconds: float, stop: threading.Event
) -> str | None:
    """Until the process ends by itself, or has to be ended; then why."""
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
        time.sleep(_EVERY_S)
    return None


def _read_progress(lines: Any, progress: Callable[[float, str], None]) -> None:
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        match told:  # anything else is a library's own word
            case [int() | float() as share, str() as text]:
                progress(share, text)
