"""Runs the tasks of a comparison, each in a process of its own, and resumes where it stopped."""

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from slam_jax.errors import InputError, require_count, write_whole
from slam_jax.rocket.board import Comparison
from slam_jax.rocket.jobs import run_job
from slam_jax.rocket.live import LiveTable
from slam_jax.rocket.machine import code_version, describe_machine
from slam_jax.rocket.tasks import Json, Results, Task, failure
from slam_jax.runtime.lock import lock_workdir

_Measured = tuple[Task, Json, float]  # a task, its figures, and the seconds that it took


def run(
    comparison: Comparison,
    workdir: str | Path,
    *,
    memory_gib: float = 16.0,
    seconds: float = 3_600.0,
    jobs: int = 1,
    console: Any = None,
) -> Json:
    """Runs a comparison, writes its leaderboard to `workdir`, and returns it.

    Every finished task is saved at once, with the time and the version of the code. The same call
    resumes: it runs what is missing and what failed; a failed optional task only until a required
    task of its system has finished.

    Args:
      memory_gib, seconds: limits of each process. One that exceeds them becomes a failed row.
      jobs: processes at a time for tasks that are not timed; each gets its share of the cores.

    Raises:
      InputError: the workdir is of other settings. WorkdirError: another run uses it, or it cannot
      be written. WriteError: it can no longer be written.
    """
    require_count("number of models", len(comparison.models))
    require_count("jobs", jobs, most=1_024)
    limits = {"memory_gib": memory_gib, "seconds": seconds, "jobs": jobs}
    with lock_workdir(workdir):
        machine = describe_machine()
        results = _measure(comparison, Path(workdir), limits, machine["cores"], console)
        results = {name: results[name] for name in comparison.models}
        about = {**comparison.identity, "limits": limits, "machine": machine}
        board = comparison.board({**about, "measured": _provenance(results)}, results)
        page = comparison.page(board)
        text = json.dumps(board, indent=2, allow_nan=False) + "\n"
        for name, content in {
            "leaderboard.json": text,
            "comprehensive_model_results.json": text,  # the name of the published file
            "leaderboard.md": page.markdown,
            "leaderboard.html": page.html,
        }.items():
            write_whole(Path(workdir, name), content)
    return board


def _measure(
    comparison: Comparison, workdir: Path, limits: Json, all_cores: int, console: Any
) -> dict[str, dict[str, Json]]:
    """The figures of all tasks, by system and label, including those of earlier runs."""
    path, models = workdir / "results.json", comparison.models
    results = {**{name: {} for name in models}, **_read_results(path, comparison)}

    def remaining() -> list[Task]:
        tasks = comparison.tasks(results)
        failed = {name for name in models if failure(name, tasks, results[name])}
        return [t for t in tasks if t.system not in failed and t.label not in results[t.system]]

    def measure(task: Task, cores: Sequence[int], stop: threading.Event) -> _Measured:
        start, at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        measured = {"code": code_version(), "cores": len(cores) or all_cores, "at": at}
        progress = partial(table.update, task)
        figures: Json = {"reason": task.impossible}
        if task.impossible is None:
            figures = run_job(
                task, comparison.settings, limits, cores=cores, progress=progress, stop=stop
            )
        return task, {**figures, "measured": measured}, time.monotonic() - start

    with LiveTable(models, console) as table:
        for task, figures, took in _schedule(measure, remaining, limits["jobs"]):
            results[task.system][task.label] = figures
            stored = {**comparison.identity, "results": results}
            write_whole(path, json.dumps(stored, indent=1, allow_nan=False))
            table.finished(task, figures.get("reason"), took, remaining())
    return results


def _schedule(
    measure: Callable[[Task, Sequence[int], threading.Event], _Measured],
    remaining: Callable[[], Sequence[Task]],
    jobs: int,
) -> Iterator[_Measured]:
    """Measures tasks until none remains, and yields each as it finishes. Any exception stops all.

    A timed task has all cores. The others have their share, even if nothing runs beside them:
    another number of cores would add floating-point numbers in another order.
    """
    stop, shares = threading.Event(), _shares(jobs)
    running: dict[Future[_Measured], tuple[Task, Sequence[int]]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                while len(running) < jobs:
                    task = _next(remaining(), [task for task, _ in running.values()])
                    if task is None:
                        break
                    cores = () if task.timed else shares.pop()
                    running[pool.submit(measure, task, cores, stop)] = task, cores
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    task, cores = running.pop(future)
                    if not task.timed:
                        shares.append(cores)
                    yield future.result()
        finally:
            stop.set()


def _next(remaining: Sequence[Task], running: Collection[Task]) -> Task | None:
    """The first task that may run now. Tasks of one system run one after the other, because their
    arguments may depend on the one before; a timed task runs alone."""
    if any(task.timed for task in running):
        return None
    busy = {task.system for task in running}
    for task in remaining:
        if task.timed:
            return None if running else task
        if task.system not in busy:
            return task
    return None


def _shares(jobs: int) -> list[Sequence[int]]:
    """The cores of each of `jobs` processes; () = all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if jobs == 1 or len(cores) < jobs:
        return [()] * jobs
    return [cores[i::jobs] for i in range(jobs)]


def _provenance(results: Results) -> Json:
    """The versions of the code that measured, the numbers of cores, and the first and last time."""
    stamps = [figures["measured"] for done in results.values() for figures in done.values()]
    found = {key: sorted({stamp[key] for stamp in stamps}) for key in ("code", "cores", "at")}
    times = found.pop("at")
    return {**found, "first": min(times, default=""), "last": max(times, default="")}


def _read_results(path: Path, comparison: Comparison) -> dict[str, dict[str, Json]]:
    """The figures that an earlier run of the same settings has stored; none if there was none.

    Failed tasks are left out and run again. Failed optional tasks stay once a required task of
    their system has finished: it has depended on their outcome, or, for the stress test, comes
    before it, and the failure is the result.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        results = {name: dict(done) for name, done in stored["results"].items()}
        _provenance(results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not the results of a leaderboard ({error}); give another --workdir, or "
            "delete this one"
        ) from None
    identity = comparison.identity
    if {name: stored.get(name) for name in identity} != identity:
        raise InputError(f"{path}: is of other settings; give another --workdir, or delete it")
    tasks = comparison.tasks(results)
    optional = {(task.system, task.label) for task in tasks if task.optional}
    finished = {
        (name, label)
        for name, done in results.items()
        for label, figures in done.items()
        if "reason" not in figures
    }
    settled = {t.system for t in tasks if not t.optional and (t.system, t.label) in finished}
    return {
        name: {
            label: figures
            for label, figures in done.items()
            if (name, label) in finished or (name in settled and (name, label) in optional)
        }
        for name, done in results.items()
    }
