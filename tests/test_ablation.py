"""The protocol `ablation`: variants, accuracies, differences, the board."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from slam_jax.errors import ConfigError
from slam_jax.evaluation.answers import Answer
from slam_jax.rocket.ablation.measure import AblationSettings, run, score
from slam_jax.rocket.ablation.protocol import OVERALL, Ablation
from slam_jax.rocket.machine import describe_machine
from slam_jax.rocket.protocols import make_comparison
from slam_jax.slam_v3 import SlamV3
from slam_jax.slam_v3.flops import encode_flops
from slam_jax.training import Experiment
from slam_jax.training.experiment import read_config
from tests.helpers import schema_errors

CONFIG = Path(__file__).parents[1] / "configs" / "ablations" / "sort_of_clevr.py"


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def shipped() -> AblationSettings:
    return AblationSettings(**read_config(CONFIG))


def sizes(settings: AblationSettings, name: str) -> tuple[int, int]:
    """Parameters, and operations of the encoder on the mix that is tested."""
    config = Experiment.from_config(settings.config_of(name, 0)).with_vocabulary(410)
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    return count, encode_flops(config, text=18, aux=3)


@pytest.mark.parametrize("name", ["two_processes", "one_process"])
def test_fewer_processes_are_as_large_or_as_costly_as_four(shipped, name):
    parameters, flops = sizes(shipped, "four_processes")
    assert sizes(shipped, f"{name}_same_parameters")[0] == pytest.approx(parameters, rel=0.01)
    assert sizes(shipped, f"{name}_same_flops")[1] == pytest.approx(flops, rel=0.01)


def test_every_variant_differs_in_the_listed_fields(shipped):
    first = shipped.config_of("four_processes", 0)
    for name, changes in shipped.variants.items():
        config = shipped.config_of(name, 2)
        assert config["seed"] == config["data"]["seed"] == 2
        for field, value in changes.items():
            group, field = field.split(".")
            assert config[group].pop(field) == value != first[group].pop(field, None)
            first = shipped.config_of("four_processes", 0)
    assert len({json.dumps(changes) for changes in shipped.variants.values()}) == 14


def answer(view: str, scene: int, correct: bool, needs_both: bool = False) -> Answer:
    return Answer(view, scene, "relational", needs_both, "?", "yes", "yes" if correct else "no", 0)


def test_answers_are_counted_by_scene():
    answers = [
        answer("split_text_aux", 0, True),
        answer("split_text_aux", 0, False, needs_both=True),
        answer("split_text_aux", 2, True),
        answer("split_text_aux_only_text", 0, False, needs_both=True),
        answer("split_text_aux_only_text", 2, True),
        answer("aux", 1, True),
    ]
    assert score(answers) == {
        "split_text_aux/relational": {"asked": [2, 0, 1], "right": [1, 0, 1]},
        "split_text_aux/needs both": {"asked": [1, 0, 0], "right": [0, 0, 0]},
        "split_text_aux/needs both, text only": {"asked": [1, 0, 0], "right": [0, 0, 0]},
        "aux/relational": {"asked": [0, 1, 0], "right": [0, 1, 0]},
    }


@pytest.fixture(scope="module")
def protocol(shipped) -> Ablation:
    base = json.loads(json.dumps(dict(shipped.base)))
    base["data"] |= {"batch_size": 2, "stages": [[0, {"aux": 1.0}]]}
    base["run"]["num_steps"] = 3
    variants = {
        "whole": {},
        "worse": {"model.num_processes": 1},
        "same": {"model.without": ["mean", "concat"]},
        "broken": {},
    }
    return Ablation(AblationSettings(base, variants, (0, 1, 2)), list(variants), "")


def done(right: int, noise: int) -> dict[str, Any]:
    """Figures of 40 scenes of 20 questions, of which about `right` are answered rightly."""
    rng = np.random.default_rng(noise)
    hard = np.random.default_rng(7).integers(-4, 4, 40)  # some scenes are hard for all

    def figures() -> dict[str, Any]:
        counts = (right + hard + rng.integers(-1, 2, 40)).tolist()
        return {
            "parameters": 100,
            "flops": {"aux": {"encoder": 5_000_000, "decoder": 7_000_000}},
            "scores": {
                "aux/relational": {"asked": [20] * 40, "right": counts},
                "aux/needs both": {"asked": [2] * 40, "right": [1] * 40},
                # A table's kinds of questions are any text.
                "aux/needs both, {a}: b. c|d!": {"asked": [2] * 40, "right": [1] * 40},
            },
            "train_seconds": 2.0,
            "peak_memory_bytes": 1 << 30,
        }

    return {f"seed {seed}": figures() for seed in range(3)}


@pytest.fixture
def board(protocol) -> dict[str, Any]:
    results = {"whole": done(14, 1), "worse": done(12, 2), "same": done(14, 3)}
    results["broken"] = {"seed 0": {"reason": "took more than 9 s"}}
    about = {
        "protocol": "ablation",
        "settings": protocol.settings,
        "data": {},
        "limits": {"memory_gib": 16.0, "seconds": 60.0, "jobs": 2},
        "machine": describe_machine(),
        "measured": {"code": ["abc"], "cores": [2], "first": "2026-01-02", "last": "2026-01-03"},
    }
    return protocol.board(about, results)


def test_differences_are_paired_and_have_an_interval(board):
    whole, worse, same, broken = board["rows"]
    runs = [run["accuracy"][OVERALL] for run in whole["runs"]]
    mean = whole["accuracy"][OVERALL]
    assert mean["mean"] == pytest.approx(np.mean(runs)) and mean["low"] < mean["mean"]
    # Questions that need both halves are counted in their kind already.
    assert mean == whole["accuracy"]["aux/relational"]
    assert whole["difference"] is None
    difference = worse["difference"][OVERALL]
    assert difference["mean"] == pytest.approx(worse["accuracy"][OVERALL]["mean"] - mean["mean"])
    assert -0.13 < difference["low"] < difference["high"] < -0.07
    # Scenes differ more than variants do; pairing removes that.
    assert mean["high"] - mean["low"] > difference["high"] - difference["low"]
    assert same["difference"][OVERALL]["low"] < 0 < same["difference"][OVERALL]["high"]
    assert broken["status"] == "failed" and broken["reason"] == "took more than 9 s"
    assert worse["changes"] == {"model.num_processes": 1}


def test_without_the_first_there_are_no_differences(protocol):
    results = {"whole": {"seed 0": {"reason": "took more than 9 s"}}}
    results |= {"worse": done(12, 2), "same": done(14, 3)}
    whole, *others = protocol.board({}, results)["rows"]
    assert whole["status"] == "failed" and [row["difference"] for row in others] == [None, None]


def test_the_board_follows_its_schema_and_the_pages_have_every_row(board, protocol):
    assert schema_errors(board) == []
    page = protocol.page(board)
    text, whole = page.markdown, page.html
    assert "| num_processes 1 | 100 | 5.00 | 12.00 |" in text
    assert "| without mean, concat |" in text
    assert "- broken: `took more than 9 s`" in text
    assert r"| aux/needs both, {a}: b. c\|d! |" in text and "50.0 (50.0 to 50.0)" in text
    assert re.search(r"\| -\d+\.\d \(-1\d\.\d to -\d\.\d\) \* \|", text)
    assert (
        "<svg" in whole and "sort_of_clevr, 3 steps of 2 examples (from step 0 on aux 1)" in whole
    )
    del board["rows"][1]["difference"]
    assert len(schema_errors(board)) >= 1
    protocol.page({**board, "rows": [], "category_winners": {}})


def test_invalid_variants_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="variants are not given; give --config a file of them"):
        make_comparison("ablation", None, [], None, tmp_path)
    with pytest.raises(ConfigError, match="variants has no field 'one_proces'; did you mean"):
        make_comparison("ablation", CONFIG, [], ("one_proces",), tmp_path)
    argument = "--config.variants.isolated_only={'model.withou': 1}"
    with pytest.raises(ConfigError, match="model has no field 'withou'; did you mean 'without'"):
        make_comparison("ablation", CONFIG, [argument], None, tmp_path)
    with pytest.raises(ConfigError, match="seeds is .*; expected some, all different"):
        make_comparison("ablation", CONFIG, ["--config.seeds=[1, 1]"], None, tmp_path)


def test_every_variant_runs_with_every_seed_and_the_first_always_runs(tmp_path):
    made = make_comparison(
        "ablation", CONFIG, ["--config.seeds=[3, 5]"], ("shared_only",), tmp_path
    )
    assert isinstance(made, Ablation) and made.models == ("four_processes", "shared_only")
    tasks = made.tasks({})
    assert [(task.system, task.label) for task in tasks] == [
        ("four_processes", "seed 3"),
        ("shared_only", "seed 3"),
        ("four_processes", "seed 5"),
        ("shared_only", "seed 5"),
    ]
    assert tasks[2].arguments == {"workdir": str(tmp_path / "runs"), "seed": 5}


@pytest.mark.slow
def test_a_run_is_trained_and_tested(shipped, tmp_path):
    base = json.loads(json.dumps(dict(shipped.base)))
    base["data"] |= {"name": "sort_of_clevr/tiny", "batch_size": 4}
    base["data"]["stages"] = [[0, {"split_text_aux": 1.0}]]
    base["run"] |= {"num_steps": 2, "evaluate_every": 2, "evaluate_batches": 1}
    small = {"embed_dim": 16, "mlp_dim": 16, "kv_lora_rank": 8, "num_heads": 2}
    small |= {"num_processes": 2, "num_process_layers": 1, "num_decoder_layers": 1}
    base["model"] |= small
    settings = AblationSettings(base, {"cut": {"model.without": ["concat"]}}, (4,))
    figures = run("cut", settings, quiet, workdir=str(tmp_path), seed=4)
    assert set(figures["scores"]) == {
        "split_text_aux/non_relational",
        "split_text_aux/relational",
        "split_text_aux/needs both",
        "split_text_aux/needs both, text only",
        "split_text_aux/needs both, aux only",
    }
    for counts in figures["scores"].values():
        assert all(r <= a for r, a in zip(counts["right"], counts["asked"], strict=True))
    assert set(figures["scores"]["split_text_aux/relational"]["asked"]) == {10}
    assert figures["flops"]["split_text_aux"]["encoder"] > 0 and figures["parameters"] > 0
    # A second run resumes from the checkpoints and gives the same scores.
    again = run("cut", settings, quiet, workdir=str(tmp_path), seed=4)
    assert again["scores"] == figures["scores"]
    assert runpy.run_path(str(CONFIG))["VARIANTS"]["without_concat"] == settings.variants["cut"]
