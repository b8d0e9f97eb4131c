"""A run that is changed when it resumes: what may change, what is stored, which examples follow."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same

from slam_jax.data import DataConfig, prepare, training_batches
from slam_jax.data.order import UNCHANGED, Order
from slam_jax.errors import ConfigError
from slam_jax.slam_v3 import SlamV3Config
from slam_jax.training import (
    CheckpointError,
    Checkpoints,
    LanguageExperiment,
    default_config,
    default_language_config,
    override,
    train,
)
from slam_jax.training.changes import DATA, changed_at, differences, extended, order_of
from slam_jax.training.metrics import read_metrics

pytestmark = pytest.mark.release

WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def write_rows(folder: Path, count: int) -> None:
    rows = [{"text": f"{WORDS[i % 7]} {i}", "answer": WORDS[i % 3]} for i in range(count)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))


def config_of(folder: Path, **changes: Any) -> Any:
    config: Any = default_config("tiny")
    config.data.name, config.data.path = "folder", str(folder)
    config.data.batch_size, config.data.vocab_size = 4, 300
    config.data.stages = ((0, {"text": 1.0}),)
    config.run.num_steps, config.run.evaluate_every, config.run.evaluate_batches = 4, 4, 1
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    return override(config.to_dict(), arguments)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_rows(folder, 40)
    return folder


@pytest.fixture(scope="module")
def finished(own, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("change") / "run"
    seen: dict[str, list[Any]] = {"metrics": [], "scores": []}
    train(
        config_of(own, **{"run.log_every": 2}),
        workdir,
        on_metrics=lambda step, values: seen["metrics"].append((step, values)),
        on_evaluation=lambda step, scores: seen["scores"].append((step, scores)),
    )
    return workdir, seen


@pytest.mark.slow
def test_a_caller_is_told_what_the_metrics_file_says(finished, capsys):
    workdir, seen = finished
    records = read_metrics(workdir)
    losses = [(r["step"], r["total"]) for r in records if r["split"] == "train"]
    assert [(step, float(values["total"])) for step, values in seen["metrics"]] == losses
    assert [step for step, _ in losses] == [2, 4]
    assert all("tokens_per_second" in values for _, values in seen["metrics"])
    [(step, scores)] = seen["scores"]
    [written] = [r for r in records if r["split"] == "validation"]
    assert written == {"step": step, "split": "validation", **scores}
    assert {"accuracy", "loss", "loss/text", "text/all"} == scores.keys()


MORE = {
    "run.num_steps": 6,
    "run.save_every": 1,
    "optimizer.learning_rate": 0.01,
    "data.batch_size": 8,
}


def test_a_run_continues_with_what_was_changed(own, finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"data.batch_size=4 .*=8; .* by --change"):
        train(config_of(own, **MORE), workdir)
    with pytest.raises(CheckpointError, match=r"model.embed_dim=.* same configuration$"):
        train(config_of(own, **{"model.embed_dim": 48}), workdir, change=True)
    with pytest.raises(ConfigError, match="run.num_steps is 3; expected at least 4"):
        train(config_of(own, **{"run.num_steps": 3}), workdir, change=True)
    state = train(config_of(own, **MORE), workdir, change=True)
    assert state.step == 6
    text = "data.batch_size 4 -> 8, optimizer.learning_rate 0.001 -> 0.01, run.num_steps 4 -> 6"
    shown = capsys.readouterr().out
    assert f"changed after step 4: {text}" in shown
    assert "done: 2 steps in" in shown and f"next: slam-eval --workdir={workdir}" in shown
    [record] = [r for r in read_metrics(workdir) if r["split"] == "change"]
    assert (record["step"], record["text"]) == (4, text)
    checkpoints = Checkpoints(workdir)
    history = checkpoints.read_history(6)
    assert order_of(history) == Order(first=4, offset=16) and len(history) == 1
    assert checkpoints.read_config(6)["data"]["batch_size"] == 8
    # Now this is its configuration, and it resumes exactly.
    shutil.rmtree(workdir / "checkpoints" / "6")
    assert_same(train(config_of(own, **MORE), workdir), state)
    assert checkpoints.read_history(6) == history


@pytest.mark.parametrize("swapped", [False, True])
def test_a_field_that_only_one_configuration_has_is_a_difference(swapped):
    config: Any = default_language_config()
    plain = LanguageExperiment.from_config(config.to_dict())
    changed = dataclasses.replace(
        plain, language_model=dataclasses.replace(plain.language_model, others={"theta": 7})
    )
    both = (changed, plain) if swapped else (plain, changed)
    values = [7, None] if swapped else [None, 7]
    assert differences(*both)["language_model.others.theta"] == values


@pytest.mark.slow
def test_added_rows_are_used_on_request(own, finished, tmp_path):
    workdir, folder = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "own"
    saved = Checkpoints(workdir).read_data(4)
    assert sum(saved["rows"].values()) == 40 and len(saved["sha256"]) == 64
    folder.mkdir()
    write_rows(folder, 60)
    more = config_of(folder, **{"run.num_steps": 5})
    with pytest.raises(CheckpointError, match=r"run.num_steps=4.* by --change"):
        train(more, workdir)
    with pytest.raises(CheckpointError, match=r"(has|have) changed.*by --change"):
        train(config_of(folder), workdir)
    train(more, workdir, change=True)
    history = Checkpoints(workdir).read_history(5)
    assert order_of(history) == Order(first=4, offset=0, number=1)
    assert list(history[0]["changes"]) == ["run.num_steps", DATA]
    assert Checkpoints(workdir).read_tokenizer(5) == Checkpoints(workdir).read_tokenizer(4)
    assert Checkpoints(workdir).read_data(5)["rows"]["train"] > saved["rows"]["train"]


def test_examples_follow_the_history_alone(own):
    """Another batch size continues in the same order; other data begin one of their own."""
    model = SlamV3Config.preset("tiny", 1)

    def rows(size: int, start: int, steps: int, order: Order) -> list[tuple[int, ...]]:
        data = DataConfig(name="folder", path=str(own), batch_size=size, stages=((0, {"text": 1}),))
        dataset = prepare(data, model=model)
        given = training_batches(
            dataset.train, dataset.tokenizer, data, start_step=start, order=order
        )
        batches = [batch for _, (_, batch) in zip(range(steps), given, strict=False)]
        return [tuple(x) for batch in batches for x in np.asarray(batch.inputs.text).tolist()]

    plain = rows(4, 0, 9, UNCHANGED)
    larger = Order(first=2, offset=8)
    assert rows(8, 2, 3, larger) == plain[8:32]
    assert rows(8, 4, 1, larger) == plain[24:32]
    others = [rows(4, 2, 4, Order(2, 0, number)) for number in (0, 1, 2)]
    assert others[0] == plain[:16] and len({str(each) for each in others}) == 3
    history = extended([], {"data.batch_size": [4, 8]}, 2, 4)
    assert order_of(history) == larger
    history = extended(history, {"run.num_steps": [9, 20]}, 5, 8)
    assert order_of(history) == Order(5, 32, 0)
    history = extended(history, {DATA: ["ab" * 32, "cd" * 32]}, 7, 8)
    assert order_of(history) == Order(7, 0, 1)
    assert changed_at(history, 7) == "the data abababab -> cdcdcdcd" and not changed_at(history, 6)
    assert order_of(extended(history, {"data.mixture": [[], [["a", 1]]]}, 9, 8)) == Order(9, 0, 2)
