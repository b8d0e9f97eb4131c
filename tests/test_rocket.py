"""The Rocket Engine: order of tasks, failures, resuming, and the files that it writes."""

import io
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from slam_jax.errors import ConfigError, UserError
from slam_jax.rocket.board import Comparison
from slam_jax.rocket.engine import run
from slam_jax.rocket.live import LiveTable
from slam_jax.rocket.machine import code_version
from slam_jax.rocket.page import Page, print_page, table, to_html
from slam_jax.rocket.protocols import make_comparison
from slam_jax.rocket.seed.measure import SeedSettings
from slam_jax.rocket.seed.protocol import Seed
from slam_jax.rocket.tasks import Json, Results, Task, failure, plain
from slam_jax.runtime.lock import lock_workdir
from tests.helpers import TINY_SEED


class Pretended(Comparison):
    """A protocol whose tasks do not run; see `pretend`."""

    name = "pretended"

    def __init__(self, models: Sequence[str], settings: Json | None = None, timed: bool = True):
        self.models, self._timed = models, timed
        self.settings: Json = settings or {"width": 1}
        self.data = {"from": "nowhere"}

    def tasks(self, results: Results) -> list[Task]:
        why = {("c", "second"): "no arguments"}
        return [
            Task(
                name,
                label,
                print,
                arguments={"before": list(results.get(name, {}))},
                optional=label == "extra",
                timed=self._timed,
                impossible=why.get((name, label)),
            )
            for label in ("first", "second", "extra")
            for name in self.models
        ]

    def board(self, about: Json, results: Results) -> Json:
        plain = {
            name: {
                label: {key: value for key, value in figures.items() if key != "measured"}
                for label, figures in done.items()
            }
            for name, done in results.items()
        }
        return {**about, "results": plain}

    def row(self, name: str, done: Any) -> Json:
        return {}

    def judge(self, rows: list[Json]) -> Json:
        return {}

    def page(self, board: Json) -> Page:
        return Page("# Pretended", "", "")


@pytest.fixture
def pretend(monkeypatch):
    """Replaces jobs: each is recorded, and returns a figure or fails."""
    asked, fails = [], set()

    def run_job(task, settings, limits, *, progress, **others):
        asked.append((task.system, task.label, tuple(task.arguments["before"])))
        progress(0.5, "half")
        if (task.system, task.label) in fails:
            return {"reason": "it failed"}
        return {"value": f"{task.system} {task.label}"}

    monkeypatch.setattr("slam_jax.rocket.engine.run_job", run_job)
    return asked, fails


def test_a_failure_affects_one_row(tmp_path, pretend, capsys):
    asked, fails = pretend
    fails |= {("a", "first"), ("b", "extra")}
    board = run(Pretended(("a", "b", "c")), tmp_path)
    # A system runs no more tasks after a failure, unless the failed task was optional.
    assert asked == [
        ("a", "first", ()),
        ("b", "first", ()),
        ("c", "first", ()),
        ("b", "second", ("first",)),
        ("b", "extra", ("first", "second")),
    ]
    assert board["results"]["a"] == {"first": {"reason": "it failed"}}
    assert board["results"]["b"]["extra"] == {"reason": "it failed"}
    assert board["results"]["c"]["second"] == {"reason": "no arguments"}
    tasks = Pretended(("a", "b", "c")).tasks({})
    assert failure("b", tasks, board["results"]["b"]) is None
    assert failure("a", tasks, board["results"]["a"]) == "it failed"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1/7 a, first: it failed · ETA ") and len(lines) == 6
    assert lines[-1] == "6/6 b, extra: it failed"


def test_untimed_tasks_may_run_at_the_same_time(tmp_path, monkeypatch):
    meet, beside = threading.Barrier(2, timeout=30), []

    def run_job(task, *given, **others):
        if task.label != "extra":
            meet.wait()  # until another task runs, too
        beside.append((task.label, task.system))
        return {"value": task.system}

    monkeypatch.setattr("slam_jax.rocket.engine.run_job", run_job)
    board = run(Pretended(("a", "b"), timed=False), tmp_path, jobs=2)
    assert [label for label, _ in beside] == ["first"] * 2 + ["second"] * 2 + ["extra"] * 2
    assert board["limits"]["jobs"] == 2 and set(board["results"]["b"]) == {
        "first",
        "second",
        "extra",
    }


def test_a_task_starts_when_another_ends(tmp_path, monkeypatch):
    """The first task of `a` ends after two tasks of `b`."""
    over = threading.Event()

    def run_job(task, *given, **others):
        if (task.system, task.label) == ("a", "first"):
            assert over.wait(30)
        if (task.system, task.label) == ("b", "second"):
            over.set()
        return {}

    monkeypatch.setattr("slam_jax.rocket.engine.run_job", run_job)
    run(Pretended(("a", "b"), timed=False), tmp_path, jobs=2)


@pytest.mark.parametrize(
    ("timed", "jobs", "expected"),
    [
        (False, 2, {(0, 2), (1, 3)}),  # of four cores
        (True, 2, {()}),
        (False, 1, {()}),
        (False, 5, {()}),
    ],
)
def test_untimed_tasks_use_their_share_of_the_cores(tmp_path, monkeypatch, timed, jobs, expected):
    shares = set()

    def run_job(task, *given, cores, **others):
        shares.add(tuple(cores))
        return {}

    monkeypatch.setattr("slam_jax.rocket.engine.run_job", run_job)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    run(Pretended(("a", "b"), timed=timed), tmp_path, jobs=jobs)
    assert shares == expected


@pytest.mark.parametrize(("models", "timed"), [(("a", "b"), True), (("a",), False)])
def test_timed_tasks_and_tasks_of_one_system_run_alone(tmp_path, monkeypatch, models, timed):
    running = []

    def run_job(task, *given, **others):
        assert not running
        running.append(task)
        time.sleep(0.02)
        running.remove(task)
        return {}

    monkeypatch.setattr("slam_jax.rocket.engine.run_job", run_job)
    board = run(Pretended(models, timed=timed), tmp_path, jobs=4)
    assert all(len(done) == 3 for done in board["results"].values())


def test_an_exception_stops_the_other_tasks(tmp_path, monkeypatch):
    ended = []

    def run_job(task, *given, stop, **others):
        if task.system == "a":
            raise KeyboardInterrupt
        ended.append(stop.wait(30))
        return {}

    monkeypatch.setattr("slam_jax.rocket.engine.run_job", run_job)
    with pytest.raises(KeyboardInterrupt):
        run(Pretended(("a", "b"), timed=False), tmp_path, jobs=2)
    assert ended == [True]


def test_a_run_resumes_with_missing_tasks(tmp_path, pretend):
    asked, _ = pretend
    whole = run(Pretended(("a", "b")), tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    del kept["results"]["b"]["second"], kept["results"]["a"]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    asked.clear()
    again = run(Pretended(("a", "b")), tmp_path)
    assert again["results"] == whole["results"]
    assert [each[:2] for each in asked] == [
        ("a", "first"),
        ("a", "second"),
        ("b", "second"),
        ("a", "extra"),
    ]
    stamps = [each["measured"] for done in kept["results"].values() for each in done.values()]
    assert {stamp["code"] for stamp in stamps} == {code_version()} == {*again["measured"]["code"]}
    assert again["measured"]["first"] == min(stamp["at"] for stamp in stamps)
    names = {path.name for path in tmp_path.iterdir()}
    pages = {"leaderboard.json", "leaderboard.md", "leaderboard.html"}
    assert names == pages | {"comprehensive_model_results.json", "results.json", "lock"}
    for name in ("leaderboard.json", "comprehensive_model_results.json"):
        assert json.loads((tmp_path / name).read_text()) == again
    # The board has the systems of this run; others that were measured before are left out.
    assert set(run(Pretended(("b",)), tmp_path)["results"]) == {"b"}


def test_failed_tasks_run_again(tmp_path, pretend):
    asked, fails = pretend
    fails |= {("a", "first"), ("b", "extra")}
    run(Pretended(("a", "b")), tmp_path)
    fails.clear()
    asked.clear()
    board = run(Pretended(("a", "b")), tmp_path)
    # Optional tasks do not: `b` has continued without its own.
    labels = [("a", "first"), ("a", "second"), ("a", "extra")]
    assert [each[:2] for each in asked] == labels
    assert board["results"]["b"]["extra"] == {"reason": "it failed"}


def test_a_failed_optional_task_runs_again_if_no_other_depended_on_it(tmp_path, pretend):
    """Such as the try of a learning rate that was ended from outside."""
    asked, fails = pretend
    fails.add(("b", "extra"))
    run(Pretended(("b",)), tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    del kept["results"]["b"]["first"], kept["results"]["b"]["second"]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    fails.clear()
    asked.clear()
    board = run(Pretended(("b",)), tmp_path)
    assert [each[:2] for each in asked] == [("b", "first"), ("b", "second"), ("b", "extra")]
    assert board["results"]["b"]["extra"] == {"value": "b extra"}


def test_two_runs_cannot_share_a_workdir(tmp_path, pretend):
    with lock_workdir(tmp_path), pytest.raises(UserError, match="another run is in progress"):
        run(Pretended(("a",)), tmp_path)


def test_other_settings_need_another_workdir(tmp_path, pretend):
    run(Pretended(("a",)), tmp_path)
    with pytest.raises(UserError, match="is of other settings; give another --workdir"):
        run(Pretended(("a",), {"width": 2}), tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    del kept["results"]["a"]["first"]["measured"]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="not the results of a leaderboard .'measured'."):
        run(Pretended(("a",)), tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="not the results of a leaderboard"):
        run(Pretended(("a",)), tmp_path)


@pytest.mark.slow
def test_a_system_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    board = run(Seed(TINY_SEED, ("standard",)), tmp_path)
    (row,) = board["rows"]
    assert row["status"] == "ok" and len(row["losses"]) == 3 and row["stress"]["max_batch"] == 4
    assert capsys.readouterr().out.startswith("1/3 standard, updates: ")
    assert json.loads((tmp_path / "leaderboard.json").read_text()) == board


def test_the_remaining_time_follows_from_weights(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("slam_jax.rocket.live.time.monotonic", lambda: now[0])
    output = io.StringIO()
    tasks = [Task("a", "first", print, 2.0), Task("a", "second", print, 1.0)]
    with LiveTable(["a"], Console(file=output, width=80)) as table:
        now[0] = 100.0
        table.finished(tasks[0], None, 100.0, tasks[1:])
        now[0] = 150.0
        table.finished(tasks[1], "it failed", 50.0, [])
    assert output.getvalue().splitlines() == [
        "1/2 a, first: 100 s · ETA 0:00:50",
        "2/2 a, second: it failed",
    ]


def test_the_live_table_has_a_row_for_each_system():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    tasks = [Task("standard", "updates", print), Task("moe", "updates", print)]
    with LiveTable(["standard", "moe"], console) as table:
        table.update(tasks[0], 0.5, "loss 9.1")
        table.finished(tasks[1], None, 3.0, tasks[:1])
    shown = output.getvalue()
    assert "updates: loss 9.1" in shown and "1 of 2 tasks · ETA" in shown
    assert "updates: 3 s" in shown


def test_a_page_is_escaped_and_has_its_figures():
    row = {"system": "a<b|c", "seconds": {"median": 1.0, "least": 0.5, "most": 2.0, "n": 3}}
    text = table([row], {"system": "{system}", "ms": "{seconds ms:.0f}", "n": "{seconds.n:d}"})
    assert text.splitlines()[1:] == [
        "| :--- | ---: | ---: |",
        "| a<b\\|c | 1000 (500 to 2000) | 3 |",
    ]
    whole = to_html(f"# A <page>\n\n{text}\n\n- one & two\n\n![a plot](0)\n", ["<svg></svg>"])
    for part in ("<title>A &lt;page&gt;</title>", "a&lt;b|c</td>", "one &amp; two", "<svg></svg>"):
        assert part in whole
    output = io.StringIO()
    print_page(Page("", "", "## T\n\n| value |\n| --- |\n| 1 |\n"), Console(file=output, width=40))
    assert output.getvalue().split()[0] == "T" and "1" in output.getvalue()


def test_settings_come_from_a_file_and_from_arguments(tmp_path):
    file = tmp_path / "config.py"
    file.write_text("def get_config():\n    return {'preset': 'tiny', 'rounds': 2}\n")
    made = make_comparison("seed", file, ["--config.rounds=4"], ("standard",), tmp_path)
    assert made.settings == plain(SeedSettings(preset="tiny", rounds=4))
    for argument, message in (
        ("--config.round=4", "has no field 'round'; did you mean 'rounds'"),
        ("--config.rounds=0", "rounds is 0; expected at least 1"),
        ("--config.learning_rate=-1.0", "learning_rate is -1.0; expected a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_comparison("seed", None, [argument], ("standard",), tmp_path)
    with pytest.raises(ConfigError, match="has no field 'standart'"):
        make_comparison("seed", None, [], ("standart",), tmp_path)
