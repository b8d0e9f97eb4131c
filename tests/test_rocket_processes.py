"""The protocol `processes`: runs, tasks, differences and the page."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from slam_jax.data.fresh_scenes import FreshScenes
from slam_jax.rocket.machine import describe_machine
from slam_jax.rocket.processes.measure import GROUPS, ProcessSettings, conditions, run
from slam_jax.rocket.processes.protocol import Processes
from slam_jax.rocket.protocols import PROTOCOLS, make_comparison
from slam_jax.rocket.sweep import best_rate, validation_losses
from slam_jax.slam_v3 import SlamV3
from slam_jax.slam_v3.flops import decode_flops, encode_flops, num_memory
from slam_jax.training import Experiment
from slam_jax.training.experiment import read_config
from tests.helpers import schema_errors

CONFIG = Path(__file__).parents[1] / "configs" / "experiments" / "processes.py"


@pytest.fixture(scope="module")
def shipped() -> ProcessSettings:
    return ProcessSettings(**read_config(CONFIG))


@pytest.fixture(scope="module")
def tiny(shipped, tmp_path_factory) -> ProcessSettings:
    base = json.loads(json.dumps(dict(shipped.base)))
    base["data"] |= {
        "name": "sort_of_clevr/tiny",
        "data_dir": str(tmp_path_factory.mktemp("data")),
        "batch_size": 4,
        "vocab_size": 300,
        "stages": [[0, {"split_image_text": 1.0}]],
    }
    base["model"] |= {"embed_dim": 32, "num_process_layers": 1}
    base["model"]["image"] |= {"patch_size": 8, "stage_widths": [8, 8]}
    base["run"] |= {"num_steps": 2, "evaluate_every": 2, "evaluate_batches": 1}
    variants = {"four": {}, "one": {"model.num_processes": 1}}
    return ProcessSettings(base, variants, (0, 1), (7, 8), (1e-3, 2e-3), 0, 100)


# What the views of the last stage, which has most of the steps, show.
SIZES: dict[str, Any] = {
    "split_image_text": {"text": 18, "pixels": (75, 75)},
    "image_text": {"text": 36, "pixels": (75, 75)},
    "image": {"pixels": (75, 75)},
    "text": {"text": 36},
    "aux": {"aux": 6},
}


def operations(experiment: Experiment, sizes: dict[str, Any]) -> tuple[int, int]:
    """Operations of the decoder, and of the whole model, for an example with 8 prompts."""
    config = experiment.with_vocabulary(416)
    encoder = encode_flops(config, **sizes)
    decoder = decode_flops(config, prompts=8, length=10, memory=num_memory(config, **sizes))
    return decoder, encoder + decoder


@pytest.mark.release
def test_variants_have_as_many_operations_as_four_processes(shipped):
    totals = {}
    for name in shipped.variants:
        experiment = Experiment.from_config(shipped.config_of(name, 0))
        model = experiment.with_vocabulary(416)
        nnx.eval_shape(lambda model=model: SlamV3(model, rngs=nnx.Rngs(0)))
        stage = experiment.data.stages[-1]
        assert set(stage.rates) == set(SIZES)
        totals[name] = sum(
            rate * operations(experiment, SIZES[view])[1] for view, rate in stage.rates.items()
        )
    for name, total in totals.items():
        assert total == pytest.approx(totals["four"], rel=0.01), (name, total / totals["four"])
    assert not set(shipped.seeds) & set(shipped.tuning_seeds) and len(shipped.seeds) == 8


def test_the_encoder_has_nearly_all_operations(shipped):
    experiment = Experiment.from_config(shipped.config_of("four", 0))
    decoder, total = operations(experiment, SIZES["split_image_text"])
    assert decoder < 0.15 * total


def arguments(workdir) -> dict[str, Any]:
    return dict(workdir=str(workdir), seed=7, learning_rate=1e-3)


@pytest.mark.slow
def test_a_trial_is_scored_by_its_validation_loss(tiny, tmp_path):
    trial = run("one", tiny, lambda *_: None, **arguments(tmp_path), trial=True)
    assert list(trial) == ["validation_loss"] and 0 < trial["validation_loss"] < 20


@pytest.mark.slow
def test_a_run_is_scored_under_all_conditions(tiny, tmp_path):
    figures = run("one", tiny, lambda *_: None, **arguments(tmp_path), trial=False)
    assert list(figures["conditions"]) == list(conditions(100))
    for scores in figures["conditions"].values():
        assert [len(scores[what]) for what in ("nats", "right", "asked")] == [GROUPS] * 3
        assert sum(scores["asked"]) == 100 * 20
        assert 0 <= scores["calibration_error"] <= 1
    assert figures["flops"]["encoder"] > 0 and json.dumps(figures)


def test_rates_are_chosen_by_the_mean_over_the_tuning_seeds(tiny):
    protocol = Processes(tiny, ("four", "one"), "")
    trials = [task for task in protocol.tasks({}) if task.optional]
    assert [(t.system, t.label) for t in trials[:3]] == [
        ("four", "learning rate 0.001, seed 7"),
        ("four", "learning rate 0.001, seed 8"),
        ("one", "learning rate 0.001, seed 7"),
    ]
    assert len(trials) == 8 and {t.arguments["seed"] for t in trials} == {7, 8}
    losses = {0.001: (1.0, 3.0), 0.002: (1.9, 1.9)}
    done = {
        f"learning rate {rate:g}, seed {seed}": {"validation_loss": loss}
        for rate, pair in losses.items()
        for seed, loss in zip((7, 8), pair, strict=True)
    }
    assert validation_losses(done, tiny) == {0.001: 2.0, 0.002: 1.9}
    runs = [task for task in protocol.tasks({"four": done}) if not task.optional]
    assert [t.arguments["learning_rate"] for t in runs if t.system == "four"] == [0.002] * 2
    assert {t.arguments["seed"] for t in runs} == {0, 1}
    assert all(t.impossible for t in runs if t.system == "one")
    # A rate counts once it was tried with all seeds.
    del done["learning rate 0.002, seed 8"]
    assert best_rate(validation_losses(done, tiny)) == 0.001


def figures(nats: float, noise: int) -> dict[str, Any]:
    rng = np.random.default_rng(noise)
    hard = np.random.default_rng(3).normal(0, 2, GROUPS)  # some groups are hard for all
    scores = {
        "nats": (20 * nats + hard + rng.normal(0, 0.1, GROUPS)).tolist(),
        "right": [15] * GROUPS,
        "asked": [20] * GROUPS,
        "calibration_error": 0.02,
    }
    flops = {"encoder": 5_000_000, "decoder": 1_000_000}
    return {"parameters": 9, "flops": flops, "conditions": dict.fromkeys(conditions(100), scores)}


def test_rows_are_sorted_by_the_first_endpoint_and_differences_are_paired(tiny):
    protocol = Processes(tiny, ("four", "one"), "")
    trial = {
        f"learning rate {rate:g}, seed {seed}": {"validation_loss": rate}
        for rate in (1e-3, 2e-3)
        for seed in (7, 8)
    }
    results = {
        name: {**trial, "seed 0": figures(nats, 1), "seed 1": figures(nats, 2)}
        for name, nats in (("four", 0.50), ("one", 0.48))
    }
    about = {
        "protocol": "processes",
        "settings": protocol.settings,
        "data": {},
        "limits": {"memory_gib": 16.0, "seconds": 60.0, "jobs": 2},
        "machine": describe_machine(),
        "measured": {"code": ["abc"], "cores": [1], "first": "2026-01-02", "last": "2026-01-03"},
    }
    board = protocol.board(about, results)
    assert [row["system"] for row in board["rows"]] == ["one", "four"]
    found = board["rows"][0]["differences"]["four"]["both streams"]["nats"]
    assert found["low"] < found["mean"] < found["high"] < 0
    assert found["mean"] == pytest.approx(-0.02) and found["high"] - found["low"] < 0.01
    assert board["rows"][0]["learning_rate"] == 1e-3
    assert schema_errors(board) == []
    page = protocol.page(board)
    assert "| one | 0.47" in page.markdown and "-0.0200" in page.markdown
    assert page.html.count("8 objects") > 2 and "num_processes 1" in page.markdown


def test_the_shipped_comparison_is_built_from_its_file(tmp_path):
    protocol = make_comparison("processes", CONFIG, ["--config.num_scenes=300"], None, tmp_path)
    assert isinstance(protocol, Processes) and protocol.models[0] == "four"
    assert len(protocol.options.seeds) == 8 and protocol.options.num_scenes == 300


def test_the_command_takes_every_protocol():
    names = "flags.FLAGS['protocol'].parser.enum_values"
    script = f"from slam_jax.rocket.__main__ import flags; print(*{names})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == list(PROTOCOLS)


def test_fresh_scenes_are_in_no_split_and_shifts_change_what_they_say():
    plain, more = FreshScenes(3), FreshScenes(3, num_objects=8)
    noisy = FreshScenes(3, noise=32.0)
    for i in range(3):
        rng = [np.random.default_rng(i) for _ in range(3)]
        one, other, third = (
            source.render(source[i], "split_image_text", each)
            for source, each in zip((plain, more, noisy), rng, strict=True)
        )
        pixels: list[Any] = [each.image for each in (one, other, third)]
        colours = [len(np.unique(x.reshape(-1, 3), axis=0)) for x in pixels]
        assert colours[:2] == [4, 6]  # white, three objects, two more
        assert one.text == third.text and one.answers == third.answers
        # Where noise cannot be cut at 0 or 255, it has the standard deviation that was asked for.
        noise = pixels[2].astype(np.int32)[pixels[0] == 128] - 128
        assert not noise.size or 24 < np.std(noise) < 40
        assert len(other.prompts) == 20
