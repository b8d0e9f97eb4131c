"""Measures the systems one after the other and writes the leaderboard; goes on where it was."""

import dataclasses
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import psutil

from slam_jax.errors import require_count, write_whole, writing
from slam_jax.language_models import ROCKET, make_config
from slam_jax.rocket.board import make_board, read_results, write_board
from slam_jax.rocket.jobs import run_job
from slam_jax.rocket.live import LiveTable
from slam_jax.rocket.report import write_html, write_markdown
from slam_jax.rocket.seed import SeedSettings
from slam_jax.version import __version__

DEFAULT_MODELS = (*ROCKET, "slam_v3_text")
_KEPT = "results.json"


def run_seed(
    workdir: str | Path,
    *,
    models: tuple[str, ...] = DEFAULT_MODELS,
    settings: SeedSettings | None = None,
    memory_gib: float = 16.0,
    seconds: float = 1_200.0,
    console: Any = None,
) -> dict[str, Any]:
    """The published comparison over some systems of the registry; returns and writes the board.

    Each system learns in one process, and then all are timed in turns, `rounds` times. What is
    finished is kept in `workdir` at once, and not measured again by the same call.

    Args:
      memory_gib, seconds: limits of each process; one that is ended at them is a row that says so.

    Raises:
      ConfigError: a system is not in the registry. InputError: the workdir is of other settings.
      WriteError: the workdir cannot be written.
    """
    settings, workdir = settings or SeedSettings(), Path(workdir)
    for name in models:
        make_config(name, settings.preset)
    require_count("number of models", len(models))
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    given = dataclasses.asdict(settings)
    results = read_results(workdir / _KEPT, given)
    limits = {"memory_gib": memory_gib, "seconds": seconds}

    def keep() -> None:
        kept = {"settings": given, "results": results}
        write_whole(workdir / _KEPT, json.dumps(kept, indent=1, allow_nan=False))

    def measured(name: str) -> int:
        """Tasks of a system that are done."""
        result = results.get(name, {})
        if "reason" in result:
            return 1 + settings.rounds
        return ("figures" in result) + len(result.get("timings", []))

    total = sum(1 + settings.rounds - measured(name) for name in models)
    with LiveTable(list(models), total, console) as table:
        for turn in range(1 + settings.rounds):
            for name in models:
                if measured(name) != turn:
                    continue
                outcome = run_job(
                    "seed_timing" if turn else "seed",
                    name,
                    given,
                    workdir,
                    **limits,
                    progress=lambda share, text, name=name: table.update(name, share, text),
                )
                if outcome.reason is not None:
                    results[name] = {"reason": outcome.reason}
                elif turn:
                    results[name]["timings"].append(outcome.figures)
                else:
                    results[name] = {"figures": outcome.figures, "timings": []}
                keep()
                what = f"timed, {turn} of {settings.rounds}" if turn else "learned"
                table.finished(name, outcome.reason or f"{what} in {outcome.seconds:.0f} s")
    wanted = {name: results[name] for name in models}
    board = make_board({**given, **limits}, describe_machine(), wanted)
    write_board(board, workdir)
    write_markdown(board, workdir / "leaderboard.md")
    write_html(board, workdir / "leaderboard.html")
    return board


def describe_machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "slam_jax": __version__,
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
