"""The Rocket Engine: what it measures, what it does about a system that fails, what it writes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slam_jax.errors import UserError
from slam_jax.rocket.board import SCORE_RULE, make_board
from slam_jax.rocket.engine import describe_machine, run_seed
from slam_jax.rocket.jobs import run_job
from slam_jax.rocket.published import PUBLISHED
from slam_jax.rocket.report import markdown, write_html
from slam_jax.rocket.seed import SeedSettings, learn, stability
from slam_jax.rocket.timing import Timing, timed

TINY = SeedSettings(
    preset="tiny",
    batch_size=2,
    length=8,
    num_updates=3,
    rounds=2,
    repeats=2,
    stress_batch=1,
    stress_length=16,
    learning_rate=3e-3,
)


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return learn("standard", TINY, quiet)


def test_figures_are_of_the_batch_that_is_learned(figures):
    losses, accuracies = figures["losses"], figures["accuracies"]
    assert len(losses) == len(accuracies) == 4
    assert losses[-1] < losses[0] - 0.5 and abs(figures["loss_fresh"] - losses[0]) < 2
    # Accuracy is a share of the 16 tokens of the batch.
    assert all((16 * a).is_integer() for a in accuracies) and figures["top1"] == accuracies[-1]
    assert figures["stability"] == pytest.approx(1 / (1 + np.std(losses)))
    assert figures["parameters"]["total"] > figures["parameters"]["embedding"] > 0
    assert figures["training_flops"] == 3 * figures["forward_flops"] > 0
    assert figures["peak_memory_bytes"] > 10_000_000 and figures["first_step_seconds"] > 0
    assert [(s["batch_size"], s["length"]) for s in figures["stress"]] == [
        (1, 16),
        (2, 32),
        (4, 64),
    ]
    assert (figures["max_batch"], figures["max_length"]) == (4, 64)  # as long as the context
    json.dumps(figures, allow_nan=False)


def test_quality_is_the_same_every_time(figures):
    again = learn("standard", TINY, quiet)
    assert again["losses"] == figures["losses"] and again["accuracies"] == figures["accuracies"]


def test_a_stable_run_is_one_whose_loss_does_not_move():
    assert stability([3.0, 3.0, 3.0]) == 1.0
    assert stability([1.0, 3.0]) == 0.5
    # What is known of the published rule: evenly falling losses of five epochs come close to it.
    for row in PUBLISHED.values():
        even = np.linspace(row.initial_loss, row.final_loss, 5).tolist()
        assert abs(stability(even) - row.stability) < 0.06


def test_timings_are_of_what_is_waited_for():
    calls = []
    seconds = timed(lambda: calls.append(0) or np.zeros(1), 3)
    assert len(calls) == 4 and len(seconds) == 3 and min(seconds) >= 0
    assert Timing.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)


@pytest.fixture(scope="module")
def results(figures) -> dict[str, Any]:
    def result(loss: float, accuracy: float, seconds: float, memory: int) -> dict[str, Any]:
        losses, accuracies = [9.0, loss], [0.0, accuracy]
        changed = {"losses": losses, "accuracies": accuracies, "peak_memory_bytes": memory}
        timings = [{"seconds": [seconds, 2 * seconds]}, {"seconds": [seconds / 2]}]
        return {"figures": {**figures, **changed}, "timings": timings}

    return {
        "slam_v6": result(1.0, 1.0, 0.2, 400),
        "standard": result(6.0, 0.25, 0.1, 100),
        "slam_v3_text": result(9.5, 0.0, 0.4, 200),
        "moe": {"reason": "took more than 16 GiB of memory"},
    }


@pytest.fixture
def board(results) -> dict[str, Any]:
    settings = {**vars(TINY), "memory_gib": 16.0, "seconds": 60.0}
    return make_board(settings, describe_machine(), results)


def test_the_score_is_its_parts_and_the_ranks_are_its_order(board):
    first, second, third, failed = board["rows"]
    assert [row["system"] for row in board["rows"][:3]] == ["slam_v6", "standard", "slam_v3_text"]
    assert [row["rank"] for row in board["rows"][:3]] == [1, 2, 3]
    assert first["score_parts"] == pytest.approx(
        {"loss": 30 * 8 / 9, "accuracy": 30.0, "speed": 10.0, "memory": 5.0}
    )
    assert second["score_parts"] == pytest.approx(
        {"loss": 10.0, "accuracy": 7.5, "speed": 20.0, "memory": 20.0}
    )
    assert third["score_parts"]["loss"] == 0.0  # it got worse
    assert first["score"] == pytest.approx(sum(first["score_parts"].values()))
    assert set(first["score_parts"]) == set(SCORE_RULE)
    assert first["inference_ms"] == pytest.approx(200.0) and first["inference"]["n"] == 3
    assert failed["status"] == "failed" and failed["reason"].startswith("took more than")


def test_rows_stand_beside_the_published_ones(board):
    first, second, third, _ = board["rows"]
    assert first["published"]["final_loss"] == 1.4962 and third["published"] is None
    assert (first["reaches_published_after"], second["reaches_published_after"]) == (1, None)
    assert first["final_perplexity"] == pytest.approx(math.e)
    winners = {name: winner["system"] for name, winner in board["category_winners"].items()}
    assert winners == {
        "loss reduction": "slam_v6",
        "final accuracy": "slam_v6",
        "perplexity": "slam_v6",
        "fastest inference": "standard",
        "most stable training": "slam_v6",
        "smallest peak memory": "standard",
    }
    statistics = board["statistics"]
    assert statistics["success_rate"] == 0.75
    assert statistics["average_loss_reduction"] == pytest.approx((8 + 3 - 0.5) / 3)
    assert statistics["above_target_score"] == [] == statistics["below_target_inference"]


def test_published_averages_are_those_of_the_published_rows():
    rows = PUBLISHED.values()
    assert np.mean([r.initial_loss - r.final_loss for r in rows]) == pytest.approx(3.1628, abs=1e-4)
    assert np.mean([r.accuracy for r in rows]) == pytest.approx(0.4831, abs=1e-4)
    # Their perplexity is that of the final loss, and their accuracies are of one batch of 1,024.
    for row in rows:
        assert row.perplexity == pytest.approx(math.exp(row.final_loss), rel=0.01)
        assert abs(1024 * row.accuracy - round(1024 * row.accuracy)) < 0.06


def test_the_pages_have_every_row(board, tmp_path):
    text = markdown(board)
    for row in board["rows"]:
        assert f"| {row['system']} |" in text or f"`{row['system']}` failed: took" in text
    assert "| 1 | slam_v6 | 71.7 | 9.000 → 1.000 | 1.0000 |" in text
    write_html(board, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and "http://" not in page.replace("http://www.w3.org", "")
    assert "<b>moe</b> failed: took more than 16 GiB of memory" in page
    write_html(make_board(board["settings"], board["machine"], {}), tmp_path / "empty.html")


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"memory_gib": 0.01}, "took more than 0.01 GiB of memory"),
        ({"seconds": 0.2}, "took more than 0.2 s"),
    ],
)
def test_a_process_is_ended_at_its_limits(tmp_path, limits, reason):
    limits = {"memory_gib": 16.0, "seconds": 300.0, **limits}
    outcome = run_job("seed", "standard", vars(TINY), tmp_path, **limits, progress=quiet)
    assert outcome.figures is None and outcome.reason == reason
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_says_why(tmp_path):
    settings = {**vars(TINY), "preset": "no such"}
    limits: dict[str, Any] = {"memory_gib": 16.0, "seconds": 300.0}
    outcome = run_job("seed", "standard", settings, tmp_path, **limits, progress=quiet)
    assert outcome.figures is None and outcome.reason is not None
    assert outcome.reason.startswith("ended with exit code 1: ")
    assert "preset is 'no such'" in outcome.reason


@pytest.mark.slow
def test_a_run_goes_on_with_what_is_missing(tmp_path, capsys):
    models = ("standard", "slam_v4")
    board = run_seed(tmp_path, models=models, settings=TINY)
    assert {row["system"] for row in board["rows"]} == set(models)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [len(r["timings"]) for r in kept["results"].values()] == [2, 2]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6 and told[0].startswith("1/6 standard: learned in")
    # As if it had been killed in the second system's last timing.
    kept["results"]["slam_v4"]["timings"].pop()
    (tmp_path / "results.json").write_text(json.dumps(kept))
    again = run_seed(tmp_path, models=models, settings=TINY)
    assert capsys.readouterr().out.startswith("1/1 slam_v4: timed, 2 of 2")
    losses = [{row["system"]: row["losses"] for row in each["rows"]} for each in (board, again)]
    assert losses[0] == losses[1]
    files = {path.name for path in Path(tmp_path).iterdir()}
    names = ("leaderboard.json", "leaderboard.md", "leaderboard.html")
    assert files == {*names, "comprehensive_model_results.json", "results.json"}
    assert json.loads((tmp_path / "leaderboard.json").read_text()) == again
    with pytest.raises(UserError, match="is of other settings; give another --workdir"):
        run_seed(tmp_path, models=models, settings=SeedSettings(preset="tiny"))
