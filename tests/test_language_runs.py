"""Language models through `train`: every model of the registry, resumed runs, adapters, scores."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, write_texts

import slam_jax
from slam_jax.data import HubTokenizer, Tokenizer
from slam_jax.data.packing import TextRows, encode_texts
from slam_jax.data.texts import Text
from slam_jax.errors import ConfigError, InputError
from slam_jax.evaluation.language import score_texts, summarise_texts
from slam_jax.language_models.registry import ROCKET, SYSTEMS, make_config, make_model
from slam_jax.layers.lora import is_adapter
from slam_jax.planning.subjects import subject_of
from slam_jax.reporting.language import evaluate_language, print_language_metrics
from slam_jax.training import (
    CheckpointError,
    Checkpoints,
    default_config,
    default_language_config,
    language_task,
    load,
    merge_model,
    override,
    read_config,
    split_model,
    train,
)
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.experiment import as_json
from slam_jax.training.kinds import task_of
from slam_jax.training.metrics import read_metrics
from slam_jax.training.resume import open_run

pytestmark = pytest.mark.release

ROOT = Path(__file__).parent.parent
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}<bos>"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts", 60)


def config_of(path: Path, name: str | None = "standard", **changes: Any) -> dict[str, Any]:
    config: Any = default_language_config()
    config.language_model.name, config.language_model.preset = name, "tiny"
    config.data.path, config.data.length, config.data.batch_size = str(path), 32, 8
    config.data.vocab_size = 300
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 2
    config.run.num_steps, config.run.evaluate_every, config.run.log_every = 20, 10, 1
    arguments = [f"--config.{field}={value}" for field, value in changes.items()]
    return override(as_json(config), arguments)


def losses(workdir: Path, split: str = "train") -> list[Any]:
    name = "total" if split == "train" else "loss"
    return [r[name] for r in read_metrics(workdir) if r["split"] == split]


def loss_at_the_start(config: Any, folder: Path) -> float:
    """On the validation split, with the initial parameters."""
    with Checkpoints(folder) as checkpoints:
        opened = open_run(task_of(config), checkpoints, None)
    parts = opened.graphdef, opened.state, opened.dataset
    return opened.task.validate(*parts, lambda: False)["loss"]


@pytest.mark.parametrize("count", [1, None])
def test_a_validation_of_some_batches_is_a_sample_of_the_split(texts, tmp_path, monkeypatch, count):
    asked = []
    score = language_task.scoring_batches
    monkeypatch.setattr(
        language_task,
        "scoring_batches",
        lambda *args, **more: asked.append(more) or score(*args, **more),
    )
    loss_at_the_start(config_of(texts, **{"run.evaluate_batches": count}), tmp_path)
    assert asked == [{"shuffled": count is not None}]


def train_until_killed(config: Any, workdir: Path, evaluation: int) -> None:
    """A run that is killed in an evaluation, counted from 1."""
    score, calls = language_task.score_texts, []

    def killed(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == evaluation:
            raise KeyboardInterrupt
        return score(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(language_task, "score_texts", killed)
        train(config, workdir)


# --- Packed rows


@pytest.mark.parametrize(
    "name",
    [x if x == "standard" else pytest.param(x, marks=slow) for x in ROCKET if x != "moe"],
)
def test_packed_rows_have_the_loss_and_gradients_of_single_ones(name):
    tokenizer = Tokenizer.train(["one"], 259)
    given = [Text("abcdefg"), Text("xyz", "ask "), Text("hijk"), Text("lmnopqrs", "x")]
    encoded: Any = encode_texts(tokenizer, given, chat=False)
    config = make_config(name, "tiny", vocab_size=259)
    fields = {each.name for each in dataclasses.fields(config)}
    none = {x: 0.0 for x in fields if x.endswith("balance_loss")}  # its mean is over other tokens
    model = make_model(dataclasses.replace(config, **none), rngs=nnx.Rngs(0))
    graphdef, params = split_model(model)
    task = language_task.LanguageTask(task_of(config_of(Path("."), name)).experiment)

    def loss(params: Any, batch: Any) -> Any:
        return task.loss(merge_model(graphdef, params), batch).cross_entropy

    both = {}
    for packed in (True, False):
        rows = TextRows.of(encoded, 24, packed=packed, pad_id=0)
        assert (len(rows) < len(encoded)) == packed
        batch = jax.tree.map(jnp.asarray, rows.batch(range(len(rows))))
        assert task.weight_of(batch) == 8 + 4 + 5 + 9
        both[packed] = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert abs(both[True][0] - both[False][0]) < 1e-5
    most = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(both[False][1]))
    close: Any = dict(rtol=1e-5, atol=1e-5 * most)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **close), both[True][1], both[False][1]
    )


# --- Runs


@pytest.mark.parametrize(
    "name",
    [x if x == "standard" else pytest.param(x, marks=slow) for x in (*ROCKET, "slam_v3_text")],
)
def test_every_model_trains_and_resumes_bit_for_bit(name, texts, tmp_path):
    config = config_of(texts, name)
    state = train(config, tmp_path / "whole")
    validation = losses(tmp_path / "whole", "validation")
    start = loss_at_the_start(config, tmp_path / "start")
    assert abs(start - math.log(300)) < 1.5  # initial logits of slam_v6 are larger than of others
    assert validation[1] < validation[0] < start - 0.2
    train_until_killed(config, tmp_path / "broken", 2)
    assert Checkpoints(tmp_path / "broken").steps() == [10]
    assert_same(train(config, tmp_path / "broken"), state)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory) -> tuple[Path, Any]:
    """The workdir of a run and its last state."""
    workdir = tmp_path_factory.mktemp("runs") / "own"
    return workdir, train(config_of(texts), workdir)


@pytest.fixture(scope="module")
def published(finished, tmp_path_factory) -> Path:
    """The model of that run as a folder of the hub, with a chat template."""
    loaded = load(finished[0], "latest")
    tokenizer = dataclasses.replace(HubTokenizer.of(loaded.tokenizer), chat_template=CHAT)
    folder = tmp_path_factory.mktemp("hub") / "model"
    slam_jax.save_pretrained(slam_jax.generation.ModelAndTokenizer(loaded.model, tokenizer), folder)
    return folder


def test_a_run_loads_as_a_language_model(finished, published, texts):
    workdir, state = finished
    loaded = load(workdir, "latest")
    assert (loaded.step, loaded.config["language_model"]["name"]) == (20, "standard")
    assert_same(split_model(loaded.model)[1], state.params)
    [answer] = slam_jax.generate(loaded, [slam_jax.Request("one two ")])
    [again] = slam_jax.generate(load(published), [slam_jax.Request("one two ")])
    assert answer.samples[0].tokens[:8] == again.samples[0].tokens[:8]


def test_a_run_is_scored_on_its_test_split(finished, texts, capsys):
    workdir, _ = finished
    # Rows of 41 tokens hold the ends of several texts.
    found = evaluate_language(workdir, "latest", ["--config.data.length=40"])
    metrics = found.metrics
    assert (metrics["step"], metrics["split"]) == (20, "test")
    assert found.folder == workdir / "eval"
    loaded, scores = load(workdir, "latest"), metrics["scores"]
    task: Any = task_of(override(loaded.config, ["--config.data.length=40"]))
    data = task.texts(loaded.tokenizer)
    assert len(data.splits["test"].rows) < len(data.splits["test"].pieces)
    nats, tokens, size = 0.0, 0, 0
    for text in data.splits["test"].texts:  # each alone, by the model itself
        ids = text.ids[None]
        for start in range(0, len(text.ids) - 1, 40):
            piece = ids[:, start : start + 41]
            logs = jax.nn.log_softmax(loaded.model(piece[:, :-1]).logits)
            nats -= float(jnp.take_along_axis(logs, piece[:, 1:, None], -1).sum())
            tokens += piece.shape[1] - 1
        size += len(loaded.tokenizer.decode(text.ids[1:]).encode())
    assert (metrics["tokens"], metrics["bytes"]) == (tokens, size)
    assert math.isclose(scores["loss"]["mean"], nats / tokens, rel_tol=1e-5)
    assert math.isclose(scores["bits_per_byte"]["mean"], nats / math.log(2) / size, rel_tol=1e-5)
    assert math.isclose(scores["perplexity"]["mean"], math.exp(nats / tokens), rel_tol=1e-4)
    assert scores["loss"]["low"] <= scores["loss"]["mean"] <= scores["loss"]["high"]
    print_language_metrics(metrics)
    assert "bits per byte" in capsys.readouterr().out
    other = evaluate_language(workdir, "latest", ["--config.data.evaluate=validation"])
    assert math.isclose(
        other.metrics["scores"]["loss"]["mean"], losses(workdir, "validation")[-1], rel_tol=1e-5
    )
    assert other.folder == workdir / "eval" / "validation"
    with pytest.raises(ConfigError, match="config.optimizer is part of the model"):
        evaluate_language(workdir, "latest", ["--config.optimizer.learning_rate=1.0"])


def test_a_published_model_is_scored_on_given_texts(finished, published, texts):
    data = [f"--config.data.path={texts}", "--config.data.length=32"]
    found = evaluate_language(published, None, data).metrics
    own = evaluate_language(finished[0], "latest", ["--config.data.evaluate=all"]).metrics
    assert found["texts"] == own["texts"] == 60
    assert math.isclose(
        found["scores"]["loss"]["mean"], own["scores"]["loss"]["mean"], rel_tol=1e-5
    )


# --- Prompts with answers


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"say {x}", "answer": f"{x} {x}"} for x in ("one", "two", "six", "ten")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PATTERNS = "('*',)"  # the head, too: a tiny model that has learned little says nothing clearly


@pytest.fixture(scope="module")
def adapted(rows, published, tmp_path_factory) -> tuple[Path, dict[str, Any], Any]:
    """A run of adapters on a published model: its workdir, configuration and last state."""
    changes = {"lora.rank": 4, "lora.patterns": PATTERNS, "run.init_from": published}
    changes |= {"data.held_out": 0.0, "data.batch_size": 2, "run.num_steps": 100}
    changes |= {"run.evaluate_every": 50, "optimizer.learning_rate": 1e-2, "data.length": 64}
    config = config_of(rows, None, **changes)
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    return workdir, config, train(config, workdir)


@pytest.mark.slow
def test_adapters_learn_answers_on_a_frozen_model(adapted, published):
    workdir, _, state = adapted
    loaded, base = load(workdir), load(published)
    own, given = (by_name(split_model(each.model)[1]) for each in (loaded, base))
    adapters = {name for name in own if is_adapter(name)}
    assert adapters == set(by_name(state.params)) and len(adapters) == 2 * (3 * 7 + 1)
    for name in given:
        np.testing.assert_array_equal(own[name], given[name])
    # What training counts as exact is what the model writes.
    assert read_metrics(workdir)[-1]["exact_match"] == 1
    ask = [
        slam_jax.Request(messages=[{"role": "user", "content": f"say {x}"}]) for x in ("one", "six")
    ]
    answers = [each.text for each in slam_jax.generate(loaded, ask)]
    assert answers == ["one one", "six six"]
    metrics = evaluate_language(workdir).metrics
    assert metrics["scores"]["exact_match"]["mean"] == 1 and metrics["data"]["answers"]
    merged = workdir.with_name("merged")
    slam_jax.save_pretrained(loaded, merged)
    assert [each.text for each in slam_jax.generate(load(merged), ask)] == answers


def test_a_checkpoint_has_the_adapters_alone_and_names_the_model(adapted, published, tmp_path):
    workdir, config, state = adapted
    checkpoints = Checkpoints(workdir)
    saved = checkpoints.read_shapes("latest")
    assert not saved.get("frozen")
    [base] = checkpoints.read_bases("latest")
    assert (base["name"], base["path"]) == ("run.init_from", str(published))
    train_until_killed(config, tmp_path / "broken", 2)
    config = override(config, ["--config.run.init_from=None"])
    assert_same(train(config, tmp_path / "broken"), state)


@pytest.mark.slow
def test_all_of_a_published_model_trains_without_adapters(rows, published, tmp_path):
    changes = {"run.init_from": published, "data.held_out": 0.0, "run.num_steps": 2}
    config = config_of(rows, None, **changes, **{"data.batch_size": 2})
    state = train(config, tmp_path)
    assert state.frozen is None
    assert Checkpoints(tmp_path).read_bases("latest") == []
    assert by_name(state.params).keys() == by_name(split_model(load(published).model)[1]).keys()
    stored = Checkpoints(tmp_path).read_config("latest")
    assert stored["optimizer"]["train"] == ["*"]
    assert stored["language_model"]["config"]["num_layers"] == 3


@pytest.mark.slow
def test_a_run_begins_with_another(finished, texts, tmp_path):
    """Its weights, its sizes and its tokenizer."""
    changes = {"run.init_from": finished[0], "run.num_steps": 1, "optimizer.learning_rate": 1e-9}
    state = train(config_of(texts, None, **changes), tmp_path)
    best = load(finished[0])
    assert load(tmp_path).tokenizer == best.tokenizer
    pairs = zip(*map(jax.tree.leaves, (state.params, split_model(best.model)[1])), strict=True)
    assert all(jnp.abs(x - y).max() < 1e-6 for x, y in pairs)


# --- What does not fit


def test_what_does_not_fit_is_told_in_a_line(finished, texts, rows, published, tmp_path):
    workdir, _ = finished
    cases = {
        "language_model.name": ("jambo", "language_model.name: .*did you mean 'jamba'"),
        "language_model.expert_dim": (3, "StandardConfig has no field 'expert_dim'"),
        "data.length": (65, "data.length is 65; expected at most 64, the context"),
        "run.evaluate_views": ("('image',)", "run.evaluate_views"),
        "lora.rank": (2, "lora.patterns"),
    }
    for field, (value, message) in cases.items():
        with pytest.raises(ConfigError, match=message):
            train(config_of(texts, **{field: value}), tmp_path / "none")
    sized: dict[str, Any] = {"run.init_from": published, "language_model.embed_dim": 8}
    with pytest.raises(ConfigError, match="embed_dim is 8; expected None, as run.init_from"):
        train(config_of(rows, None, **sized), tmp_path / "none")
    with pytest.raises(ConfigError, match="name is 'jamba'; expected 'standard' or None"):
        train(config_of(rows, "jamba", **{"run.init_from": published}), tmp_path / "none")
    with pytest.raises(CheckpointError, match="and they have changed"):
        train(config_of(write_texts(tmp_path / "less", 50)), workdir)
    with pytest.raises(CheckpointError, match=r"a run with language_model.num_layers=None and"):
        train(config_of(texts, "standard", **{"language_model.num_layers": 2}), workdir)
    with pytest.raises(CheckpointError, match="holds the run of a language model"):
        train(as_json(default_config("tiny")), workdir)
    with pytest.raises(InputError, match="is a language model; `slam-eval"):
        slam_jax.reporting.checkpoint.evaluate_checkpoint(workdir)


def test_settings_of_speed_may_change_when_a_run_is_resumed(texts, finished):
    workdir, state = finished
    changes = {"language_model.remat": "layers", "language_model.scan_layers": True}
    again = train(config_of(texts, **changes), workdir)
    assert by_name(again.params).keys() == by_name(state.params).keys()


# --- Commands


def test_the_config_is_planned_without_its_texts():
    config = override(
        read_config(ROOT / "configs" / "language_model.py"),
        ["--config.language_model.name=jamba", "--config.language_model.num_layers=8"],
    )
    subject = subject_of(config)
    assert (type(subject.config), subject.config.num_layers) == (SYSTEMS["jamba"].config, 8)
    assert subject.config.vocab_size == config["data"]["vocab_size"]
    assert subject.batch.tokens.shape == (16, 129)


@slow
def test_the_commands_train_score_and_share(texts, tmp_path):
    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=600, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    workdir, small = tmp_path / "run", "--config.language_model.preset=tiny"
    command = ["train.py", "--config=configs/language_model.py", f"--workdir={workdir}", small]
    command += [f"--config.data.path={texts}", "--config.data.length=32"]
    shown = run(*command, "--config.run.num_steps=4", "--config.run.evaluate_every=2")
    assert "step 4 · validation loss" in shown and "bits/byte" in shown
    assert "perplexity" in run("eval.py", f"--workdir={workdir}")
    assert json.loads((workdir / "eval" / "metrics.json").read_text())["step"] == 4
    run("-m", "slam_jax.trained", f"--workdir={workdir}", f"--output={tmp_path / 'hub'}")
    where = [f"--workdir={tmp_path / 'hub'}", f"--config.data.path={texts}", f"--out={tmp_path}"]
    assert "all of" in run("eval.py", *where)
    run("-m", "slam_jax.generation", f"--model={workdir}", "--prompt=one", "--max_new_tokens=4")


def test_a_summary_of_no_wrong_token_is_exact():
    model = make_model(make_config("standard", "tiny", vocab_size=259), rngs=nnx.Rngs(0))
    encoded: Any = encode_texts(Tokenizer.train(["a"], 259), [Text("b", "a")], chat=False)
    rows = TextRows.of(encoded, 8, packed=True, pad_id=0)
    scores = score_texts(*nnx.split(model), [(rows.batch([0]), rows.owners([0]))], [b"a"] * 259)
    assert (scores.tokens.tolist(), scores.bytes.tolist()) == ([2], [2])
    found = summarise_texts(scores._replace(right=scores.tokens), answers=True)
    assert found["exact_match"] == found["accuracy"] == found["token_accuracy"] == 1
    found = summarise_texts(scores._replace(right=scores.tokens - 1), answers=True)
    assert (found["exact_match"], found["token_accuracy"]) == (0, 0.5)
