"""The board of the held-out comparison: intervals, ranks, costs, the score and the pages."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from slam_jax.rocket.heldout.protocol import Heldout
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.machine import describe_machine
from slam_jax.rocket.metrics import Ratio, interval
from slam_jax.rocket.sweep import best_rate
from slam_jax.rocket.tasks import plain
from tests.helpers import schema_errors, write_texts

SETTINGS = HeldoutSettings(
    vocab_size=300,
    budget=3e5,
    length=16,
    batch_size=4,
    learning_rates=(1e-3, 4e-3),
    more_learning_rates=1,
    seeds=(0, 1),
    new_tokens=4,
    rounds=2,
)
SYSTEMS = ("standard", "moe", "slam_v4", "jamba")
MEASURED = {
    "code": ["1.0 (abc)"],
    "cores": [2],
    "first": "2026-01-02T03:04",
    "last": "2026-01-03T03:04",
}


def _done(level: float, noise: float, seed: int) -> dict[str, Any]:
    """Figures of 30 documents of 10 tokens and 20 bytes, with about `level` nats a token."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(9).normal(0, 0.5, 30)  # some documents are hard for all

    def run(shift: float) -> dict[str, Any]:
        nats = 10 * (level + shift + hard + rng.normal(0, noise, 30))
        test = {"nats": nats.tolist(), "tokens": [10] * 30, "bytes": [20] * 30}
        test |= {"top1": [4.0] * 30, "top5": [7.0] * 30}
        point = {"step": 1, "tokens": 64, "flops": 9, "train_loss": 4.0, "validation_loss": 4.0}
        measured = {"curve": [point], "validation_loss": level, "test": test}
        cost = {"train_seconds": 1.0, "peak_memory_bytes": 1 << 30}
        return {**measured, **cost, "stability": 0.9, "skipped_updates": 0}

    seconds = {
        "training_step": [0.5, 1.0, 2.0],
        **{f"first_token_{n}": [0.1] * 3 for n in (1, 8)},
        **{f"generation_{n}": [0.3] * 3 for n in (1, 8)},
    }
    return {
        "learning rate 0.001": {"validation_loss": 4.5},
        "learning rate 0.004": {"validation_loss": 4.4},
        "learning rate 0.016": {"validation_loss": 4.3},
        "seed 0": run(0.001),
        "seed 1": run(-0.001),
        **{
            f"timing {i}": {"seconds": seconds, "compile_seconds": 2.0}
            for i in range(1, SETTINGS.rounds + 1)
        },
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "standard": _done(2.00, 0.001, 1),
        "moe": _done(2.30, 0.001, 2),
        # With 30 documents and so much noise, not significantly different from the one above.
        "slam_v4": _done(2.32, 0.4, 3),
        "jamba": {"learning rate 0.001": {"reason": "x"}, "seed 0": {"reason": "no rate"}},
    }


@pytest.fixture(scope="module")
def protocol(tmp_path_factory) -> Heldout:
    folder = tmp_path_factory.mktemp("protocol")
    settings = dataclasses.replace(SETTINGS, text=str(write_texts(folder / "texts")))
    return Heldout(settings, SYSTEMS, folder)


@pytest.fixture
def board(results, protocol) -> dict[str, Any]:
    split = {"documents": 30, "bytes": 600, "tokens": 300}
    about = {
        "protocol": "heldout",
        "settings": plain(SETTINGS),
        "data": {
            "text": "stdlib",
            "version": "CPython",
            "vocab_size": 300,
            "sha256": "0",
            **dict.fromkeys(("train", "validation", "test"), split),
        },
        "limits": {"memory_gib": 16.0, "seconds": 60.0, "jobs": 1},
        "machine": describe_machine(),
        "measured": MEASURED,
    }
    return protocol.board(about, results)


@pytest.mark.release
def test_metrics_are_sums_over_documents_with_an_interval(board):
    first = board["rows"][0]
    assert first["system"] == "standard"
    runs = [run["bits_per_byte"] for run in first["runs"]]
    bits = first["bits_per_byte"]
    assert bits["mean"] == pytest.approx(np.mean(runs)) and runs[0] > runs[1]
    assert bits["mean"] == pytest.approx(first["loss"]["mean"] * 10 / 20 / math.log(2))
    # The interval is that of a mean of 30 documents, whose deviation is about half a nat.
    width = (first["loss"]["high"] - first["loss"]["low"]) / 2
    documents = np.array(first["runs"][0]["test"]["nats"]) / 10
    assert width == pytest.approx(1.96 * np.std(documents) / math.sqrt(30), rel=0.15)
    assert first["top1"] == {"mean": 0.4, "low": 0.4, "high": 0.4}
    assert first["top5"]["mean"] == 0.7


def test_ranks_are_shared_if_the_paired_difference_is_not_significant(board):
    first, second, third, failed = board["rows"]
    assert [row["system"] for row in board["rows"]] == ["standard", "moe", "slam_v4", "jamba"]
    assert [row["rank"] for row in board["rows"][:3]] == [1, 2, 2]
    assert first["difference_from_above"] is None
    # Paired: documents that are hard for both do not widen it, although the intervals overlap.
    assert second["bits_per_byte"]["low"] < first["bits_per_byte"]["high"]
    above = second["difference_from_above"]
    assert 0 < above["low"] < above["mean"] < above["high"]
    assert above["mean"] == pytest.approx(0.3 * 10 / 20 / math.log(2), rel=0.01)
    assert above["high"] - above["low"] < 0.01
    assert third["difference_from_above"]["low"] < 0 < third["difference_from_above"]["high"]
    assert failed == {
        "system": "jamba",
        "title": "Jamba 1.5",
        "status": "failed",
        "reason": "no rate",
    }


def test_intervals_include_the_variation_over_units_and_seeds():
    rng = np.random.default_rng(0)
    units = rng.normal(0, 1, 400)
    seeds = np.array([0.1, -0.1, 0.3])
    values = units + seeds[:, None]
    found = interval(Ratio(values, np.ones_like(values)))
    assert found["mean"] == pytest.approx(values.mean())
    of_units, of_seeds = 1.96 * np.std(units) / 20, 4.303 * np.std(seeds, ddof=1) / math.sqrt(3)
    reach = (found["high"] - found["low"]) / 2
    assert reach == pytest.approx(math.hypot(of_units, of_seeds), rel=0.03)
    # Equal systems are compared 100 times; about one time in twenty the difference is significant.
    clear = 0
    for _ in range(100):
        values = rng.normal(0, 1, (3, 1)) + rng.normal(0, 0.1, (3, 50))
        equal = interval(Ratio(values, np.ones_like(values)))
        clear += not equal["low"] <= 0 <= equal["high"]
    assert 0 < clear < 11
    alone = interval(Ratio(units[None], np.ones((1, 400))))
    assert (alone["high"] - alone["low"]) / 2 == pytest.approx(of_units, rel=0.05)


def test_seeds_that_differ_widen_the_interval(results, protocol):
    for shift, label in ((-6, "seed 0"), (6, "seed 1")):
        test = results["moe"][label]["test"]
        test["nats"] = [x + shift for x in test["nats"]]
    rows = protocol.board({}, results)["rows"]
    assert rows[1]["system"] == "moe" and rows[1]["rank"] == 1  # 0.3 apart, seeds 1.2 apart


def test_costs_are_rates_over_all_timing_tasks(board):
    row = board["rows"][0]
    tokens = SETTINGS.batch_size * SETTINGS.length
    trained = row["training_tokens_per_second"]
    assert (trained["median"], trained["n"]) == (tokens, 6)
    assert (trained["least"], trained["most"]) == (tokens / 2, 2 * tokens)
    generated = row["generation_tokens_per_second"]["8"]["median"]
    assert generated == pytest.approx(8 * SETTINGS.new_tokens / 0.2)
    assert row["first_token_seconds"]["1"]["median"] == pytest.approx(0.1)


def test_the_score_is_its_parts(board):
    first, second, *_ = board["rows"]
    assert first["score"] == pytest.approx(100)  # the best; no other is faster or smaller
    share = first["bits_per_byte"]["mean"] / second["bits_per_byte"]["mean"]
    assert second["score"] == pytest.approx(70 * share + 30)
    assert set(first["score_parts"]) == set(board["score_rule"])


def test_the_learning_rate_is_that_of_the_lowest_validation_loss(board):
    row = board["rows"][0]
    assert row["learning_rate"] == 0.016 and row["learning_rate_is_at_edge"]
    assert [each["validation_loss"] for each in row["tried"]] == [4.5, 4.4, 4.3]
    assert best_rate({1.0: None, 2.0: 4.0, 3.0: 3.9}) == 3.0
    assert best_rate({1.0: None}) is None


def test_the_board_follows_its_schema_and_the_pages_have_every_row(board, protocol):
    assert schema_errors(board) == []
    page = protocol.page(board)
    text, whole = page.markdown, page.html
    assert "| 1 | standard |" in text and "| 2= | moe |" in text and "| 2= | slam_v4 |" in text
    assert "- jamba: `no rate`" in text and "0.016*" in text
    assert "slam_jax 1.0 (abc); measured 2026-01-02 to 2026-01-03." in text
    assert re.search(r"\| moe \| \+0\.21\d\d \* \|\s+\|", text) and "| slam_v4 | +0.2" in text
    assert whole.count("<svg") == 10 and "jamba: <code>no rate</code>" in whole
    del board["rows"][0]["runs"][0]["curve"]
    assert len(schema_errors(board)) == 1
    protocol.page({**board, "rows": [], "category_winners": {}})
