"""Jobs of the Rocket Engine: processes, their limits, how they end, and timings."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest

from slam_jax.rocket.jobs import _read, _send, run_job
from slam_jax.rocket.machine import peak_memory, timed
from slam_jax.rocket.seed.measure import learn
from slam_jax.rocket.tasks import Json, Task, plain
from tests.helpers import TINY_SEED

LIMITS: dict[str, Any] = {"memory_gib": 16.0, "seconds": 300.0}


def quiet(*_: Any) -> None:
    pass


def job(
    settings: Any = None, stop: Any = None, cores: Any = (), progress: Any = quiet, **limits: Any
) -> Json:
    task, stop = Task("standard", "updates", learn), stop or threading.Event()
    given = settings or plain(TINY_SEED), {**LIMITS, **limits}
    return run_job(task, *given, progress=progress, stop=stop, cores=cores)


@pytest.fixture
def replace_worker(tmp_path, monkeypatch):
    """Another script is run in place of the worker."""
    started = subprocess.Popen

    def replace(script: str) -> None:
        worker = tmp_path / "worker.py"
        worker.write_text(script)
        monkeypatch.setattr(
            "slam_jax.rocket.jobs.subprocess.Popen",
            lambda command, **kw: started([command[0], str(worker)], **kw),
        )

    return replace


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"memory_gib": 0.01}, "took more than 0.01 GiB of memory"),
        ({"seconds": 0.2}, "took more than 0.2 s"),
    ],
)
def test_a_process_is_ended_at_its_limits(limits, reason):
    assert job(**limits) == {"reason": reason}


def test_a_process_ends_when_the_comparison_is_stopped():
    stop = threading.Event()
    stop.set()
    assert job(stop=stop) == {"reason": "was stopped"}


def test_a_process_that_fails_says_why():
    reason = job(settings={**plain(TINY_SEED), "preset": "no such"})["reason"]
    assert reason.startswith("ended with exit code 1: ") and "preset is 'no such'" in reason


def test_figures_from_before_the_end_are_kept(replace_worker):
    replace_worker(
        "import json, time\n"
        "print(json.dumps({'figures': {'levels': [0]}}))\n"
        "print(json.dumps({'figures': {'levels': [1]}}))\n"
        "print(json.dumps([0.5, 'half']), flush=True)\n"
        "time.sleep(60)\n"
    )
    stop = threading.Event()
    found = job(stop=stop, progress=lambda *_: stop.set())
    assert found == {"levels": [1], "reason": "was stopped"}


def test_lines_that_are_neither_progress_nor_figures_are_skipped():
    seen, figures = [], {}
    lines = ["3", '"ab"', "null", "[0.1]", '["a", "b"]', "{}", "a word", '[0.5, "half"]']
    _read([*lines, '{"figures": {"loss": 1}}'], lambda *each: seen.append(each), figures)
    assert seen == [(0.5, "half")] and figures == {"loss": 1}


def test_figures_are_read_after_half_a_line_of_a_library(capsys):
    print("half a line", end="")
    _send({"figures": {"loss": 1}})
    figures: Json = {}
    _read(capsys.readouterr().out.splitlines(), quiet, figures)
    assert figures == {"loss": 1}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no cores can be chosen here")
def test_a_process_runs_on_its_cores_alone(replace_worker):
    replace_worker(
        "import json, os, time\n"
        "time.sleep(0.5)\n"
        "print(json.dumps({'figures': {'cores': sorted(os.sched_getaffinity(0))}}))\n"
    )
    last = max(os.sched_getaffinity(0))
    assert job(cores=[last]) == {"cores": [last]}
    assert job() == {"cores": sorted(os.sched_getaffinity(0))}


def test_a_process_ends_with_the_engine_that_was_killed(tmp_path):
    """It ends even if its task has not begun. A shell takes the place of the engine."""
    job = {"function": "slam_jax.rocket.seed.measure:learn", "system": "standard"}
    job |= {"settings": {"num_updates": 100_000}, "arguments": {}}
    command = [sys.executable, "-m", "slam_jax.rocket.jobs", json.dumps(job)]
    worker = f"{shlex.join(command)} $$ >/dev/null 2>&1 &"
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


def test_timings_exclude_the_first_call():
    calls = []
    seconds = timed(lambda: calls.append(0) or np.zeros(1), 3)
    assert len(calls) == 4 and len(seconds) == 3 and min(seconds) >= 0


def test_compile_time_does_not_use_the_compilation_cache(tmp_path):
    """The process uses its cache before and after."""
    script = (
        "import jax, jax.numpy as jnp\n"
        "from jax._src import monitoring\n"
        "from slam_jax.rocket.machine import compiled\n"
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


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    large = np.ones(1 << 27)
    code = "from slam_jax.rocket.machine import peak_memory\nprint(peak_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 1e7 < int(found.stdout) < large.nbytes < peak_memory()
