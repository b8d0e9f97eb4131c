"""Jobs of the Rocket Engine: a process each, its limits, its end, its clocks."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from slam_jax.rocket.jobs import _read_progress, run_job
from slam_jax.rocket.tasks import Json, plain
from slam_jax.rocket.timing import timed
from tests.helpers import TINY_SEED

LIMITS: dict[str, Any] = {"memory_gib": 16.0, "seconds": 300.0}


def quiet(*_: Any) -> None:
    pass


def job(tmp_path: Path, what: str = "seed", settings: Any = None, **limits: Any) -> Json:
    limits = {**LIMITS, **limits}
    settings = settings or plain(TINY_SEED)
    limits.setdefault("stop", threading.Event())
    return run_job(what, "standard", settings, tmp_path, arguments={}, progress=quiet, **limits)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"memory_gib": 0.01}, "took more than 0.01 GiB of memory"),
        ({"seconds": 0.2}, "took more than 0.2 s"),
    ],
)
def test_a_process_is_ended_at_its_limits(tmp_path, limits, reason):
    assert job(tmp_path, **limits) == {"reason": reason}
    assert not list(tmp_path.iterdir())


def test_a_process_is_ended_when_all_are(tmp_path):
    stop = threading.Event()
    stop.set()
    assert job(tmp_path, stop=stop) == {"reason": "was stopped"}
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_says_why(tmp_path):
    reason = job(tmp_path, settings={**plain(TINY_SEED), "preset": "no such"})["reason"]
    assert reason.startswith("ended with exit code 1: ") and "preset is 'no such'" in reason


def test_what_was_measured_before_the_end_is_kept(tmp_path, monkeypatch):
    # A process that writes one level and is then ended by its limit.
    import slam_jax.rocket.jobs as jobs

    script = (
        "import json, pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "out.write_text(json.dumps({'levels': [1]}))\n"
        "time.sleep(60)\n"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    started = jobs.subprocess.Popen

    def popen(command, **kw):
        return started([command[0], str(worker), *command[3:]], **kw)

    monkeypatch.setattr(jobs.subprocess, "Popen", popen)
    found = job(tmp_path, "seed_stress", seconds=1.0)
    assert found == {"levels": [1], "reason": "took more than 1 s"}


def test_lines_that_are_no_progress_are_passed_over():
    told = []
    lines = ["3", '"ab"', "null", "[0.1]", '["a", "b"]', "{}", "a word", '[0.5, "half"]']
    _read_progress(lines, lambda *each: told.append(each))
    assert told == [(0.5, "half")]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no cores can be chosen here")
def test_a_process_runs_on_its_cores_alone(tmp_path, monkeypatch):
    import slam_jax.rocket.jobs as jobs

    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, sys, time\n"
        "time.sleep(0.5)\n"
        "cores = sorted(os.sched_getaffinity(0))\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps({'cores': cores}))\n"
    )
    started = jobs.subprocess.Popen
    monkeypatch.setattr(
        jobs.subprocess,
        "Popen",
        lambda command, **kw: started([command[0], str(worker), *command[3:]], **kw),
    )
    last = max(os.sched_getaffinity(0))
    assert job(tmp_path, cores=[last]) == {"cores": [last]}
    assert job(tmp_path) == {"cores": sorted(os.sched_getaffinity(0))}


def test_a_process_ends_with_the_engine_that_was_killed(tmp_path):
    """Also before it has begun. The engine is a shell here; by itself the job takes much longer."""
    settings = {"num_updates": 100_000}
    job = {"what": "seed", "system": "standard", "settings": settings, "arguments": {}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker = f"{sys.executable} -m slam_jax.rocket.worker job.json out.json $$ >/dev/null 2>&1 &"
    engine = subprocess.Popen(
        ["sh", "-c", f"{worker} echo $!; wait"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert engine.stdout is not None
    worker = psutil.Process(int(engine.stdout.readline()))
    engine.kill()
    engine.wait()
    engine.stdout.close()
    end = time.monotonic() + 60
    try:
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def test_timings_are_of_what_is_waited_for():
    calls = []
    seconds = timed(lambda: calls.append(0) or np.zeros(1), 3)
    assert len(calls) == 4 and len(seconds) == 3 and min(seconds) >= 0


def test_compiling_is_timed_without_a_cache_of_programs(tmp_path):
    """In a process of its own, whose cache is used before and after."""
    script = (
        "import jax, jax.numpy as jnp\n"
        "from jax._src import monitoring\n"
        "from slam_jax.rocket.timing import compiled\n"
        f"jax.config.update('jax_compilation_cache_dir', {str(tmp_path)!r})\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "told = []\n"
        "monitoring.register_event_listener(lambda event, **_: told.append(event))\n"
        "hit = '/jax/compilation_cache/cache_hits'\n"
        "def new(): return jax.jit(lambda x: 2 * x)\n"
        "new()(jnp.ones(3))\n"
        "told.clear(); new()(jnp.ones(3)); assert hit in told\n"
        "x = jnp.ones(3); told.clear()\n"
        "program, seconds = compiled(new(), x)\n"
        "asked = '/jax/compilation_cache/compile_requests_use_cache'\n"
        "assert asked not in told and seconds > 0 and program(x).tolist() == [2, 2, 2]\n"
        "told.clear(); new()(x); assert hit in told\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
