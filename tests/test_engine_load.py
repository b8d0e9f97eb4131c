"""Many clients of one engine at once, some of which go away or ask for what cannot be."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_engine import assert_idle, language
from test_generation import make_loaded, picture, vectors

from benchmarks.engine_load import compare_generate, make_cases, run_load, serve_alone
from slam_jax.serving import Engine

ABOUT = [
    {"image": picture(1)},
    {"text": "red circle"},
    {"aux": vectors(2, 3)},
    {"text": "größer als 日本", "image": picture(3), "aux": vectors(3, 7)},
]


def check_load(
    loaded: Any, number: int, clients: int, after: int, room: int = 96, inputs: Any = ({},)
) -> Any:
    """Every answer is the one that the request has alone, and nothing is left behind."""
    settings: Any = dict(slots=4, chunk=16, max_waiting=2 * clients)
    with Engine(loaded, **settings, prompt_cache_mb=4) as engine:
        cases = make_cases(number, room, inputs)
        load = run_load(engine, cases, clients, after)
        assert_idle(engine)
        assert not load.wrong
        assert engine.stats().reused_prompt_tokens > 0
        ended = engine.stats().requests
    whole = load.whole()
    assert len(whole) == sum(case.kind == "whole" for case in cases) <= ended["done"]
    with Engine(loaded, **settings, prompt_cache_mb=0) as other:
        assert serve_alone(other, whole)[0] == 0
        assert other.stats().reused_prompt_tokens == 0
    return load


@pytest.mark.release
def test_requests_among_others_that_fail_and_go_away_have_the_answers_that_they_have_alone():
    load = check_load(language(), 60, 8, 60)
    assert len({answer.text for _, answer in load.whole()}) > 20


@pytest.mark.slow
def test_requests_about_inputs_have_the_answers_that_they_have_alone_and_those_of_generate():
    loaded = make_loaded()
    load = check_load(loaded, 500, 32, 500, 24, ABOUT)
    counts = compare_generate(loaded, load.whole())
    assert counts["wrong"] == 0 and counts["nearly tied"] <= 0.01 * counts["equal"], counts


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind():
    """In a process without the type checks of tests, which keep memory of their own."""
    script = Path(__file__).parents[1] / "benchmarks" / "engine_load.py"
    command = [sys.executable, str(script), "--chunk=16", "--prompt_cache_mb=4"]
    # Freed memory that other arenas hold counts as resident.
    settings = {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, **settings}
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "not as they should be: 0" in told and "differ from those alone: 0" in told
    assert "slots in use at the end: 0; waiting: 0" in told and "'wrong'" not in told
    memory = re.search(r"resident memory: ([\d,]+) MiB, then ([\d,]+) MiB", told)
    assert memory is not None
    before, after = (int(x.replace(",", "")) for x in memory.groups())
    assert after - before <= 16, told
