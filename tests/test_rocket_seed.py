"""The protocol `seed`: its measurements, its board and its page."""

import json
import math
from typing import Any

import numpy as np
import pytest

from slam_jax.rocket.machine import describe_machine, spread, timed
from slam_jax.rocket.seed.measure import SeedSettings, learn, stability, stress, time_inference
from slam_jax.rocket.seed.protocol import SCORE, Seed
from slam_jax.rocket.seed.published import PUBLISHED
from slam_jax.rocket.tasks import plain
from tests.helpers import schema_errors

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

PROTOCOL = Seed(TINY, (), "")


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return learn("standard", TINY, quiet)


def test_figures_describe_the_batch_that_is_learned(figures):
    losses, accuracies = figures["losses"], figures["accuracies"]
    assert len(losses) == len(accuracies) == 4
    assert losses[-1] < losses[0] - 0.5 and abs(figures["loss_fresh"] - losses[0]) < 2
    # Accuracy is a share of the 16 tokens of the batch.
    assert all((16 * a).is_integer() for a in accuracies) and figures["top1"] == accuracies[-1]
    assert figures["stability"] == pytest.approx(1 / (1 + np.std(losses)))
    assert figures["parameters"]["total"] > figures["parameters"]["embedding"] > 0
    assert figures["training_flops"] == 3 * figures["forward_flops"] > 0
    assert figures["peak_memory_bytes"] > 10_000_000 and figures["first_step_seconds"] > 0
    json.dumps(figures, allow_nan=False)


def test_quality_is_reproducible(figures):
    again = learn("standard", TINY, quiet)
    assert again["losses"] == figures["losses"] and again["accuracies"] == figures["accuracies"]


def test_the_stress_test_doubles_until_the_context_is_full_or_a_pass_is_slow(monkeypatch):
    shapes, real = [], timed

    def timed_once(call, repeats):
        """Runs the first level; of the others only the shape is recorded."""
        (tokens,) = call.__defaults__
        shapes.append(tokens.shape)
        return real(call, repeats) if len(shapes) == 1 else [1.0]

    monkeypatch.setattr("slam_jax.rocket.seed.measure.timed", timed_once)
    *_, last = levels = list(stress("standard", TINY, quiet))
    sizes = [(level["batch_size"], level["length"]) for level in last["levels"]]
    assert sizes == [(1, 16), (2, 32), (4, 64)] == shapes  # the context has 64
    # Each level is yielded at once, so that earlier levels survive the end of the process.
    assert [len(each["levels"]) for each in levels] == [1, 2, 3]
    slow = SeedSettings(**{**vars(TINY), "stress_seconds": 0.5})
    assert len(list(stress("standard", slow, quiet))) == 1


def test_inference_is_timed_as_often_as_the_settings_say():
    assert len(time_inference("standard", TINY, quiet)["seconds"]) == TINY.repeats


def test_stability_is_1_if_the_loss_is_constant():
    assert stability([3.0, 3.0, 3.0]) == 1.0
    assert stability([1.0, 3.0]) == 0.5
    # Evenly falling losses of five epochs come close to the published values.
    for row in PUBLISHED.values():
        even = np.linspace(row["initial_loss"], row["final_loss"], 5).tolist()
        assert abs(stability(even) - row["stability"]) < 0.06


@pytest.fixture(scope="module")
def results(figures) -> dict[str, Any]:
    def result(loss: float, accuracy: float, seconds: float, memory: int) -> dict[str, Any]:
        losses, accuracies = [9.0, loss], [0.0, accuracy]
        changed = {"losses": losses, "accuracies": accuracies, "peak_memory_bytes": memory}
        levels = [
            {"batch_size": 1, "length": 16, "seconds": 1.0},
            {"batch_size": 2, "length": 32, "seconds": 9.0},
        ]
        return {
            "updates": {**figures, **changed},
            "timing 1": {"seconds": [seconds, 2 * seconds]},
            "timing 2": {"seconds": [seconds / 2]},
            "stress test": {"levels": levels},
        }

    done = {
        "slam_v6": result(1.0, 1.0, 0.2, 400),
        "standard": result(6.0, 0.25, 0.1, 100),
        "slam_v3_text": result(9.5, 0.0, 0.4, 200),
        "moe": {"updates": {"reason": "took more than 16 GiB of memory"}},
    }
    done["standard"]["stress test"] = {
        "levels": done["standard"]["stress test"]["levels"][:1],
        "reason": "took more than 16 GiB of memory",
    }
    return done


@pytest.fixture
def board(results) -> dict[str, Any]:
    about = {
        "protocol": "seed",
        "settings": plain(TINY),
        "data": {},
        "limits": {"memory_gib": 16.0, "seconds": 60.0, "jobs": 1},
        "machine": describe_machine(),
        "measured": {"code": ["abc"], "cores": [2], "first": "2026-01-02", "last": "2026-01-03"},
    }
    return Seed(TINY, list(results), "").board(about, results)


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
    assert set(first["score_parts"]) == set(SCORE)
    assert first["inference_ms"] == pytest.approx(200.0) and first["inference"]["n"] == 3
    assert failed["status"] == "failed" and failed["reason"].startswith("took more than")


def test_equal_scores_share_a_rank(results):
    same = {**results, "slam_v4": results["slam_v6"]}
    about = {"protocol": "seed", "settings": plain(TINY)}
    rows = Seed(TINY, list(same), "").board(about, same)["rows"]
    assert [row["rank"] for row in rows[:4]] == [1, 1, 3, 4]


def test_rows_have_the_published_figures(board):
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
        "most stable training": "slam_v6, standard, slam_v3_text",  # equal
        "smallest peak memory": "standard",
    }
    statistics = board["statistics"]
    assert statistics["success_rate"] == 0.75
    assert statistics["average_loss_reduction"] == pytest.approx((8 + 3 - 0.5) / 3)
    assert statistics["above_target_score"] == [] == statistics["below_target_inference"]


def test_a_stress_test_that_was_ended_keeps_its_levels_and_the_reason(board):
    first, second, *_ = board["rows"]
    assert first["stress"]["ended"] == "a forward pass took more than 4 s"
    assert (first["stress"]["max_batch"], first["stress"]["max_length"]) == (1, 16)
    assert second["stress"]["ended"] == "took more than 16 GiB of memory"
    assert second["stress"]["max_batch"] == 1 and second["status"] == "ok"


def test_published_averages_are_those_of_the_published_rows():
    rows = PUBLISHED.values()
    assert np.mean([r["initial_loss"] - r["final_loss"] for r in rows]) == pytest.approx(
        3.1628, abs=1e-4
    )
    assert np.mean([r["accuracy"] for r in rows]) == pytest.approx(0.4831, abs=1e-4)
    # Their perplexity is that of the final loss, and their accuracies are of one batch of 1,024.
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["final_loss"]), rel=0.01)
        assert abs(1024 * row["accuracy"] - round(1024 * row["accuracy"])) < 0.06


def test_the_board_follows_its_schema_and_the_pages_have_every_row(board):
    assert schema_errors(board) == []
    page = PROTOCOL.page(board)
    text, whole = page.markdown, page.html
    for row in board["rows"]:
        assert f"| {row['system']} |" in text or f"- {row['system']}: `took more" in text
        assert row["system"] in whole
    assert "| 1 | slam_v6 | 71.7 | 9.000 → 1.000 | 1.0000 |" in text
    assert whole.count("<svg") == 9 and "http://" not in whole.replace("http://www.w3.org", "")
    assert "moe: <code>took more than 16 GiB of memory</code>" in whole
    PROTOCOL.page({**board, "rows": [], "category_winners": {}})


def test_a_board_without_a_required_field_does_not_follow_the_schema(board):
    for path in (["machine", "jax"], ["rows", 0, "losses"], ["rows", 3, "reason"], ["statistics"]):
        broken = json.loads(json.dumps(board))
        *above, last = path
        inner = broken
        for key in above:
            inner = inner[key]
        del inner[last]
        assert len(schema_errors(broken)) == 1, path


def test_systems_take_turns_and_the_stress_test_is_last():
    tasks = Seed(TINY, ("standard", "moe")).tasks({})
    assert [(task.system, task.label) for task in tasks] == [
        (name, label)
        for label in ("updates", "timing 1", "timing 2", "stress test")
        for name in ("standard", "moe")
    ]
    assert [task.optional for task in tasks] == [False] * 6 + [True] * 2


def test_timings_are_summarised_by_median_and_range():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0, "n": 3}
