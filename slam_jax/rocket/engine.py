"""Measures systems task by task, each in its own process, and goes on where it was."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from slam_jax.errors import InputError, require_count, write_whole, writing
from slam_jax.rocket.jobs import run_job
from slam_jax.rocket.live import LiveTable
from slam_jax.rocket.machine import describe_machine
from slam_jax.rocket.page import html, markdown
from slam_jax.rocket.tasks import Comparison, Impossible, Json, Task, failure

_KEPT = "results.json"


def run(
    comparison: Comparison,
    workdir: str | Path,
    *,
    memory_gib: float = 16.0,
    seconds: float = 3_600.0,
    jobs: int = 1,
    console: Any = None,
) -> Json:
    """Compares systems; returns and writes the board and its pages.

    What is finished is kept in `workdir` at once, and not measured again by the same call.

    Args:
      memory_gib, seconds: limits of each process; one that is ended at them is a row that says so.
      jobs: processes at once, where nothing is timed.

    Raises:
      InputError: the workdir is of other settings. WriteError: it cannot be written.
    """
    workdir, models = Path(workdir), comparison.models
    require_count("number of models", len(models))
    require_count("jobs", jobs, most=1_024)
    tasks = comparison.tasks()
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    results = _read_results(workdir / _KEPT, comparison)
    for name in models:
        results.setdefault(name, {})
    own = {name: [task for task in tasks if task.system == name] for name in models}

    def still_open(tasks: Sequence[Task]) -> list[Task]:
        return [
            task
            for task in tasks
            if task.label not in results[task.system]
            and failure(own[task.system], results[task.system]) is None
        ]

    def measure(task: Task, stop: threading.Event) -> tuple[Task, Json, float]:
        start = time.monotonic()
        try:
            arguments = comparison.arguments(task, results[task.system])
        except Impossible as error:
            return task, {"reason": str(error)}, 0.0
        figures = run_job(
            task.what,
            task.system,
            comparison.settings,
            workdir,
            arguments=arguments,
            memory_gib=memory_gib,
            seconds=seconds,
            progress=lambda share, text: table.update(task, share, text),
            stop=stop,
        )
        return task, figures, time.monotonic() - start

    left = still_open(tasks)
    with LiveTable(models, console) as table:
        while left:
            for task, figures, took in _at_once(measure, _together(left, jobs)):
                results[task.system][task.label] = figures
                kept = {**_identity(comparison), "results": results}
                write_whole(workdir / _KEPT, json.dumps(kept, indent=1, allow_nan=False))
                left = still_open(left)
                table.finished(task, figures.get("reason"), took, left)
    limits = {"memory_gib": memory_gib, "seconds": seconds, "jobs": jobs}
    about = {**_identity(comparison), "limits": limits, "machine": describe_machine()}
    board = comparison.board(about, {name: results[name] for name in models})
    page = comparison.page(board)
    text = json.dumps(board, indent=2, allow_nan=False) + "\n"
    # The second name is that of the published file.
    for name in ("leaderboard.json", "comprehensive_model_results.json"):
        write_whole(workdir / name, text)
    write_whole(workdir / "leaderboard.md", markdown(page))
    write_whole(workdir / "leaderboard.html", html(page))
    return board


def _together(left: Sequence[Task], jobs: int) -> list[Task]:
    """The first task, and those right after it that may run beside it: of other systems, since
    what a system's task is told may depend on the one before."""
    together = [left[0]]
    for task in left[1:jobs]:
        if task.timed or left[0].timed or task.system in {each.system for each in together}:
            break
        together.append(task)
    return together


def _at_once(
    measure: Callable[[Task, threading.Event], tuple[Task, Json, float]], tasks: Sequence[Task]
) -> Iterator[tuple[Task, Json, float]]:
    """What each gives, as it comes. Whatever ends this ends all of them."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(tasks)) as pool:
        try:
            for future in as_completed([pool.submit(measure, task, stop) for task in tasks]):
                yield future.result()
        finally:
            stop.set()


def _identity(comparison: Comparison) -> Json:
    """What makes figures comparable."""
    return {"protocol": comparison.name, "settings": comparison.settings, "data": comparison.data}


def _read_results(path: Path, comparison: Comparison) -> dict[str, Any]:
    """What an earlier run of the same settings has measured already, none where there was none."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        results = {name: dict(done) for name, done in kept["results"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not what a leaderboard keeps ({error}); delete it") from None
    if {name: kept.get(name) for name in _identity(comparison)} != _identity(comparison):
        raise InputError(f"{path}: is of other settings; give another --workdir, or delete it")
    return results
