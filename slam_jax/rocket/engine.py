"""Measures systems task by task, each in its own process, and goes on where it was."""

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slam_jax.errors import InputError, require_count, write_whole
from slam_jax.rocket.jobs import run_job
from slam_jax.rocket.live import LiveTable
from slam_jax.rocket.machine import code_version, describe_machine
from slam_jax.rocket.page import html, markdown
from slam_jax.rocket.tasks import Comparison, Impossible, Json, Task, failure
from slam_jax.runtime.lock import lock_workdir

_KEPT = "results.json"

# A task, its figures, and the seconds that they took.
Measured = tuple[Task, Json, float]


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

    What is finished is kept in `workdir` at once, with when and by which code it was measured, and
    not measured again by the same call. What failed is tried again, but where the system went on
    without it.

    Args:
      memory_gib, seconds: limits of each process; one that is ended at them is a row that says so.
      jobs: processes at once, where nothing is timed, each on its share of the cores.

    Raises:
      InputError: the workdir is of other settings. WorkdirError: another run is in it, or it cannot
      be written. WriteError: no more.
    """
    require_count("number of models", len(comparison.models))
    require_count("jobs", jobs, most=1_024)
    limits = {"memory_gib": memory_gib, "seconds": seconds, "jobs": jobs}
    with lock_workdir(workdir):
        machine = describe_machine()
        results = _measure(comparison, Path(workdir), limits, machine["cores"], console)
        about = {**_identity(comparison), "limits": limits, "machine": machine}
        about["measured"] = _measured(results[name] for name in comparison.models)
        board = comparison.board(about, {name: results[name] for name in comparison.models})
        page = comparison.page(board)
        text = json.dumps(board, indent=2, allow_nan=False) + "\n"
        # The second name is that of the published file.
        for name in ("leaderboard.json", "comprehensive_model_results.json"):
            write_whole(Path(workdir, name), text)
        write_whole(Path(workdir, "leaderboard.md"), markdown(page))
        write_whole(Path(workdir, "leaderboard.html"), html(page))
    return board


def _measure(
    comparison: Comparison, workdir: Path, limits: Json, all_cores: int, console: Any
) -> dict[str, Any]:
    """All figures by system and task, those that were there already among them."""
    models, results = comparison.models, _read_results(workdir / _KEPT, comparison)
    for name in models:
        results.setdefault(name, {})

    def still_open() -> list[Task]:
        tasks = comparison.tasks(results)
        own = {name: [task for task in tasks if task.system == name] for name in models}
        return [
            task
            for task in tasks
            if task.label not in results[task.system]
            and failure(own[task.system], results[task.system]) is None
        ]

    def measure(task: Task, cores: Sequence[int], stop: threading.Event) -> Measured:
        start, count = time.monotonic(), len(cores) or all_cores
        measured = {"code": code_version(), "cores": count, "at": _now()}
        try:
            arguments = comparison.arguments(task, results[task.system])
        except Impossible as error:
            return task, {"reason": str(error), "measured": measured}, 0.0
        figures = run_job(
            task.what,
            task.system,
            comparison.settings,
            workdir,
            arguments=arguments,
            memory_gib=limits["memory_gib"],
            seconds=limits["seconds"],
            cores=cores,
            progress=lambda share, text: table.update(task, share, text),
            stop=stop,
        )
        return task, {**figures, "measured": measured}, time.monotonic() - start

    with LiveTable(models, console) as table:
        for task, figures, took in _side_by_side(measure, still_open, limits["jobs"]):
            results[task.system][task.label] = figures
            kept = {**_identity(comparison), "results": results}
            write_whole(workdir / _KEPT, json.dumps(kept, indent=1, allow_nan=False))
            table.finished(task, figures.get("reason"), took, still_open())
    return results


def _side_by_side(
    measure: Callable[[Task, Sequence[int], threading.Event], Measured],
    still_open: Callable[[], Sequence[Task]],
    jobs: int,
) -> Iterator[Measured]:
    """What each task gives, as it comes, until none is open. Whatever ends this ends all of them.

    What is timed has all cores to itself; what is not has its share of them, also where nothing
    runs beside it: sums come in another order on other numbers of cores.
    """
    stop, shares = threading.Event(), _shares(jobs)
    running: dict[Future[Measured], tuple[Task, Sequence[int]]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                while len(running) < jobs:
                    task = _next(still_open(), [task for task, _ in running.values()])
                    if task is None:
                        break
                    cores = () if task.timed else shares.pop()
                    running[pool.submit(measure, task, cores, stop)] = task, cores
                if not running:
                    return
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    task, cores = running.pop(future)
                    if not task.timed:
                        shares.append(cores)
                    yield future.result()
        finally:
            stop.set()


def _next(left: Sequence[Task], running: Collection[Task]) -> Task | None:
    """The first of these that may run beside those: of a system of which none is running, since
    what its task is told may depend on the one before; and alone where it or another is timed."""
    if any(task.timed for task in running):
        return None
    busy = {task.system for task in running}
    for task in left:
        if task.timed:
            return None if running else task
        if task.system not in busy:
            return task
    return None


def _shares(jobs: int) -> list[Sequence[int]]:
    """The cores of each of so many processes; none = all of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if jobs == 1 or len(cores) < jobs:
        return [()] * jobs
    return [cores[i::jobs] for i in range(jobs)]


def _measured(results: Iterable[Mapping[str, Json]]) -> Json:
    """By which versions of the code, on how many cores, and when."""
    stamps = [figures["measured"] for done in results for figures in done.values()]
    times = [stamp["at"] for stamp in stamps]
    return {
        "code": sorted({stamp["code"] for stamp in stamps}),
        "cores": sorted({stamp["cores"] for stamp in stamps}),
        "first": min(times),
        "last": max(times),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _identity(comparison: Comparison) -> Json:
    """What makes figures comparable."""
    return {"protocol": comparison.name, "settings": comparison.settings, "data": comparison.data}


def _read_results(path: Path, comparison: Comparison) -> dict[str, Any]:
    """What an earlier run of the same settings has measured already, none where there was none.

    Without what failed, which may have been for another limit, or a neighbour's memory; with it
    where it was optional: others have been measured on the strength of it, and how far a system
    came may be all that was asked."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        results = {name: dict(done) for name, done in kept["results"].items()}
        for stamp in (
            figures["measured"] for done in results.values() for figures in done.values()
        ):
            _ = stamp["code"], stamp["cores"], stamp["at"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not what a leaderboard keeps ({error}); give another --workdir, or delete "
            "this one"
        ) from None
    if {name: kept.get(name) for name in _identity(comparison)} != _identity(comparison):
        raise InputError(
            f"{path}: is of other settings; give another --workdir, or delete this one"
        )
    optional = {(task.system, task.label) for task in comparison.tasks(results) if task.optional}
    return {
        name: {
            label: figures
            for label, figures in done.items()
            if "reason" not in figures or (name, label) in optional
        }
        for name, done in results.items()
    }
