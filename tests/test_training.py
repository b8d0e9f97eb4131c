"""Training: what is minimised, what a step does, and that a run goes on as if never broken off."""

import dataclasses
import functools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from slam_jax.data import Batch, prepare, training_batches
from slam_jax.errors import ConfigError
from slam_jax.evaluation.checkpoint import evaluate_checkpoint
from slam_jax.slam_v3 import Inputs, SlamV3
from slam_jax.training import (
    CheckpointError,
    Checkpoints,
    Experiment,
    LossConfig,
    OptimizerConfig,
    default_config,
    load,
    loop,
    make_optimizer,
    make_train_step,
    merge_model,
    override,
    read_config,
    slam_v3_loss,
    split_model,
    train,
)
from slam_jax.training.experiment import as_json
from slam_jax.training.losses import answer_mask
from slam_jax.training.metrics import read_metrics
from slam_jax.training.state import init_state

ROOT = Path(__file__).parent.parent
VOCAB = 13


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def assert_same(a, b):
    """Equal to the last bit, typed keys included."""
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    assert tree_a == tree_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def batch(make_inputs):
    """Four examples of two questions: <bos>, a prompt of 1 to 3 tokens, an answer of 1 or 2."""
    rng = np.random.default_rng(0)
    prompt = np.array([[2, 3], [4, 2], [2, 2], [3, 4]], np.int32)
    length = prompt + 1 + np.array([[1, 2], [1, 1], [2, 2], [1, 1]], np.int32)
    tokens = rng.integers(3, VOCAB, (4, 2, 7), np.int32)
    inputs = Inputs(aux=make_inputs(4).aux)
    return Batch(inputs, np.where(np.arange(7) < length[..., None], tokens, 0), prompt, length)


@pytest.fixture
def loss():
    return functools.partial(slam_v3_loss, config=LossConfig())


# --- Loss


def test_loss_covers_the_answer_and_its_end_and_nothing_else(batch):
    mask = answer_mask(batch)
    assert mask.shape == (4, 2, 6)
    # Prompt of 2, length 4: tokens 2 and 3 are answer and <eos>, predicted at 1 and 2.
    assert mask[0, 0].tolist() == [False, True, True, False, False, False]
    assert mask[0, 1].tolist() == [False, False, True, True, True, False]
    np.testing.assert_array_equal(mask.sum(-1), batch.length - batch.prompt_length)


def test_loss_is_the_mean_over_answer_tokens(build, batch):
    model = build()
    parts = jax.jit(functools.partial(slam_v3_loss, config=LossConfig(z_loss=0.5)))(model, batch)
    logits = jax.jit(SlamV3.__call__)(model, batch.tokens[..., :-1], batch.inputs).logits
    rows: Any = np.asarray(logits, np.float64)
    losses, normalisers, right = [], [], []
    for b, q in np.ndindex(4, 2):
        for t in range(batch.prompt_length[b, q], batch.length[b, q]):
            row, target = rows[b, q, t - 1], batch.tokens[b, q, t]
            normalisers.append(np.log(np.exp(row).sum()))
            losses.append(normalisers[-1] - row[target])
            right.append(row.argmax() == target)
    close(parts.cross_entropy, np.mean(losses))
    close(parts.z_loss, np.mean(np.square(normalisers)))
    close(parts.accuracy, np.mean(right))
    close(parts.total, parts.cross_entropy + 0.5 * parts.z_loss)
    assert parts.alignment == 0


def test_alignment_counts_only_where_text_and_image_show_the_same(build, batch, make_inputs):
    model, whole = build(), make_inputs(4)
    loss = jax.jit(functools.partial(slam_v3_loss, config=LossConfig(alignment=0.1)))
    shown = Inputs(text=whole.text, image=whole.image)
    parts = loss(model, dataclasses.replace(batch, inputs=shown, paired=True))
    embed = jax.jit(SlamV3.embed)
    text, image = embed(model, Inputs(text=shown.text)), embed(model, Inputs(image=shown.image))
    close(parts.alignment, model.alignment.loss(text, image))
    close(parts.total, parts.cross_entropy + 0.1 * parts.alignment)
    assert loss(model, dataclasses.replace(batch, inputs=shown, paired=False)).alignment == 0


# --- The step


def test_accumulated_gradients_are_those_of_the_whole_batch(build, batch, loss):
    graphdef, params = split_model(build())
    # As many answer tokens in each half, or the mean of means would be another.
    even = dataclasses.replace(batch, length=batch.prompt_length + 2)
    sgd = optax.sgd(1.0)
    new = []
    for parts in (1, 2):
        step = jax.jit(make_train_step(graphdef, loss, sgd, accumulate_steps=parts))
        state, metrics = step(init_state(params, sgd, jax.random.key(0), ema=False), even)
        new.append((state.params, metrics))
    jax.tree.map(close, *new)


def test_donated_steps_lower_the_loss_and_the_average_follows(build, batch, loss):
    graphdef, params = split_model(build())
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=5, ema_decay=0.5)
    optimizer = make_optimizer(config, 30)
    step = make_train_step(graphdef, loss, optimizer, ema_decay=config.ema_decay)
    step = jax.jit(step, donate_argnums=0)
    copy = jax.tree.map(jnp.copy, params)
    state, losses = init_state(copy, optimizer, jax.random.key(0), ema=True), []
    average = np.asarray(params["head"]["kernel"])
    for i in range(30):
        before = state
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss.total))
        decay = min(0.5, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * np.asarray(state.params["head"]["kernel"])
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 30
    close(state.ema["head"]["kernel"], average)
    assert state.best_params is state.ema
    assert before.params["head"]["kernel"].is_deleted()


def test_each_step_drops_out_by_a_key_of_its_own(build, batch):
    graphdef, params = split_model(build())
    sgd, keys = optax.sgd(0.0), []

    def parts(model, batch, *, key):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return slam_v3_loss(model, batch, LossConfig(), key=None)

    step = jax.jit(make_train_step(graphdef, parts, sgd))
    state = init_state(params, sgd, jax.random.key(0), ema=False)
    for _ in range(3):
        state, _ = step(state, batch)
    jax.effects_barrier()
    assert len(set(keys)) == 3


def nan_loss(parts, model):
    return parts.total * jnp.nan


def nan_gradient(parts, model):
    """sqrt(x - x): the value is 0 and the slope is not finite."""
    bias = model.level_one.norm.scale[0]
    return parts.total + jnp.sqrt(bias - bias)


@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
def test_a_step_that_is_not_finite_is_one_that_never_was(build, batch, loss, poison):
    graphdef, params = split_model(build(dropout=0.1))
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=2), 10)
    bad = dataclasses.replace(batch, length=-batch.length)  # how the loss below tells them apart

    def poisoned(model, batch, *, key):
        length = jnp.abs(batch.length)
        parts = loss(model, dataclasses.replace(batch, length=length), key=key)
        broken = jax.lax.cond(batch.length[0, 0] < 0, poison, lambda p, m: p.total, parts, model)
        return parts._replace(total=broken)

    step = jax.jit(make_train_step(graphdef, poisoned, optimizer, ema_decay=0.9))
    state = reference = init_state(params, optimizer, jax.random.key(0), ema=True)
    counts = []
    for given in (batch, bad, bad, batch):
        state, metrics = step(state, given)
        counts.append((int(metrics.bad_steps), int(state.skipped)))
        if given is bad:
            reference = dataclasses.replace(reference, step=reference.step + 1)
        else:
            reference, _ = step(reference, given)
    assert counts == [(0, 0), (1, 1), (2, 2), (0, 2)]
    assert_same(dataclasses.replace(state, skipped=reference.skipped), reference)
    assert not jnp.array_equal(state.params["head"]["kernel"], params["head"]["kernel"])


def test_split_and_merge_are_inverse(build, batch):
    model = build()
    graphdef, params = split_model(model)
    assert_same(nnx.state(merge_model(graphdef, params)), nnx.state(model))


# --- Configuration


def test_a_configuration_survives_json():
    config = default_config("medium")
    experiment = Experiment.from_config(config)
    assert Experiment.from_config(json.loads(json.dumps(as_json(config)))) == experiment
    assert experiment.model.embed_dim == 256
    assert experiment.model.image.stage_widths == (64, 128, 256)
    assert experiment.with_vocabulary(77).vocab_size == 77


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.embed_dmi=3", "model has no field 'embed_dmi'; did you mean 'embed_dim'"),
        ("--config.sede=3", "the config has no field 'sede'; did you mean 'seed'"),
        ("--config.model.image.sizes=3", "model.image has no field 'sizes'; did you mean 'size'"),
        ("--config.seed.x=3", "seed has no field 'x'"),
        ("--config.seed", "argument '--config.seed'; expected --config.field=value"),
        ("--confg.seed=1", "expected --config.field=value"),
    ],
)
def test_an_override_that_fits_nothing_is_refused(argument, message):
    with pytest.raises(ConfigError, match=message):
        override(as_json(default_config()), [argument])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("run.num_steps", "3", "run.num_steps is '3'; expected a whole number"),
        ("run.num_steps", True, "run.num_steps is True; expected a whole number"),
        ("run.num_steps", 0, "run.num_steps is 0; expected at least 1"),
        ("optimizer.clip_norm", "x", "optimizer.clip_norm is 'x'; expected a number or None"),
        ("optimizer.name", "adam", "optimizer.name is 'adam'; expected one of ('adamw', 'muon')"),
        ("optimizer.momentum", -0.1, "optimizer.momentum is -0.1; expected a number from 0 to 1"),
        ("optimizer.b1", 1.5, "optimizer.b1 is 1.5; expected a number from 0 to 1"),
        ("loss.z_loss", -1.0, "loss.z_loss is -1.0; expected 0"),
        ("model.embed_dim", 0, "model.embed_dim is 0; expected at least 1"),
        ("model.image.size", 0, "model.image.size is 0; expected at least 1"),
        ("model.image", 3, "model.image is 3; expected a group of fields"),
        ("run.tensorboard", 1, "run.tensorboard is 1; expected True or False"),
    ],
)
def test_a_value_that_cannot_be_built_is_named(name, value, message):
    config = override(as_json(default_config()), [f"--config.{name}={value!r}"])
    with pytest.raises(ConfigError, match=re.escape(message)):
        Experiment.from_config(config)


def test_a_field_that_does_not_exist_is_named_with_the_nearest():
    config = as_json(default_config())
    config["optimizer"]["learning_rat"] = 1.0
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        Experiment.from_config(config)


def test_overrides_are_literals_or_text_and_leave_the_original():
    config = as_json(default_config())
    changed = override(
        config, ["--config.seed=7", "--config.data.name=mine/x", "--config.model.window=None"]
    )
    assert (changed["seed"], changed["data"]["name"]) == (7, "mine/x")
    assert config["seed"] == 0


# --- A run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    changes = {
        "model.aux_dim": 10,
        "model.dropout": 0.1,
        "data.name": "sort_of_clevr/tiny",
        "data.data_dir": str(tmp_path_factory.mktemp("data")),
        "data.batch_size": 4,
        "data.vocab_size": 300,
        "data.stages": [[0, {"aux": 1.0}]],
        "optimizer.warmup_steps": 2,
        "run.num_steps": 6,
        "run.evaluate_every": 2,
        "run.evaluate_batches": 2,
        "run.keep_every": 2,
        "run.log_every": 1,
        "optimizer.ema_decay": 0.9,
    }
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    return override(as_json(default_config("tiny")), arguments)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config, workdir)


def numbers(workdir):
    return [
        (r["step"], r["split"], r.get("total"), r.get("accuracy")) for r in read_metrics(workdir)
    ]


def test_a_run_leaves_checkpoints_and_metrics(config, finished):
    workdir, state = finished
    assert state.step == 6
    assert Checkpoints(workdir).steps() == [2, 4, 6]
    records = read_metrics(workdir)
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["split"] == "validation"] == [2, 4, 6]
    assert {"accuracy", "aux/relational", "aux/non_relational"} <= records[-1].keys()
    assert Checkpoints(workdir).read_config("latest") == config


def test_the_loaded_model_is_the_one_that_was_trained(config, finished):
    workdir, state = finished
    loaded = load(workdir, "latest")
    assert (loaded.step, loaded.config) == (6, config)
    assert_same(split_model(loaded.model)[1], state.ema)
    data = Experiment.from_config(config).data
    dataset = prepare(data)
    assert loaded.tokenizer == dataset.tokenizer
    _, batch = next(training_batches(dataset.train, loaded.tokenizer, data))
    logits = jax.jit(SlamV3.__call__)(loaded.model, batch.tokens, batch.inputs).logits
    assert logits.shape == (*batch.tokens.shape, loaded.tokenizer.vocab_size)
    assert jnp.isfinite(logits).all()


def test_a_finished_run_returns_its_state_at_once(config, finished, monkeypatch):
    workdir, state = finished
    monkeypatch.setattr(loop, "validate", None)
    before = numbers(workdir)
    assert_same(train(config, workdir), state)
    assert numbers(workdir) == before


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(config, finished, tmp_path, monkeypatch):
    workdir, state = finished
    # The machine itself repeats: else the comparison below would say nothing.
    assert_same(train(config, tmp_path / "again"), state)
    validate = loop.validate

    def fails_at_the_second(experiment, graphdef, state, *more):
        if int(state.step) == 4:
            raise KeyboardInterrupt
        return validate(experiment, graphdef, state, *more)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "validate", fails_at_the_second)
        train(config, broken)
    assert Checkpoints(broken).steps() == [2]
    assert_same(train(config, broken), state)
    assert numbers(broken) == numbers(workdir)


def break_steps(monkeypatch, steps):
    """The batches of these steps hold a NaN."""
    batches = loop.training_batches

    def broken(*args, start_step=0, **kwargs):
        made = batches(*args, start_step=start_step, **kwargs)
        for step, (view, batch) in enumerate(made, start_step + 1):
            if step in steps:
                aux = np.full_like(batch.inputs.aux, np.nan)
                batch = dataclasses.replace(batch, inputs=Inputs(aux=aux))
            yield view, batch

    monkeypatch.setattr(loop, "training_batches", broken)


@pytest.mark.slow
def test_a_run_goes_back_past_bad_batches_and_on(config, tmp_path, monkeypatch, capsys):
    changes = {"run.max_bad_steps": 2, "run.num_steps": 9, "run.save_every": 3}
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    config = override(config, [*arguments, "--config.run.evaluate_every=9"])
    break_steps(monkeypatch, {2, 5, 6})
    restored = []
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda *a: (restored.append(a[1]), restore(*a))[1])
    state = train(config, tmp_path / "run")
    assert restored == [3]
    assert (state.step, state.skipped, state.bad_steps) == (9, 3, 0)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))
    shown = capsys.readouterr().out
    assert "step 2 (aux): loss or gradient is not finite, step skipped" in shown
    assert "step 6: loss or gradient has not been finite for 2 steps; going on with" in shown
    # What a killed run that is started again does, too.
    validate = loop.validate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "validate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config, tmp_path / "broken")
    assert loop.validate is validate
    assert Checkpoints(tmp_path / "broken").steps() == [3, 6]
    assert_same(train(config, tmp_path / "broken"), state)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_stays_bad_stops_with_its_checkpoint_whole(config, tmp_path, monkeypatch):
    config = override(config, ["--config.run.max_bad_steps=2", "--config.run.num_steps=40"])
    break_steps(monkeypatch, range(3, 99))
    message = r"for 4 steps, also not from the checkpoint of step 4; lower .* steps 3 to 6$"
    with pytest.raises(loop.TrainingDiverged, match=message):
        train(
            override(config, ["--config.run.evaluate_every=30", "--config.run.save_every=2"]),
            tmp_path,
        )
    assert Checkpoints(tmp_path).verify() == {2: None, 4: None}


def test_a_workdir_belongs_to_one_configuration(config, finished):
    other = override(config, ["--config.optimizer.learning_rate=0.5"])
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate=0\.001 .*=0\.5; use ano"):
        train(other, finished[0])


@pytest.mark.slow
def test_evaluation_of_a_checkpoint_writes_every_view(finished):
    workdir, _ = finished
    results = evaluate_checkpoint(workdir, "latest", ["--config.data.batch_size=16"])
    written = json.loads((workdir / "eval" / "metrics.json").read_text())
    assert written == results.metrics
    assert written["step"] == 6
    views = written["views"]
    names = {"image", "text", "aux", "image_text", "split_image_text", "split_image_aux"}
    assert set(views) == names
    for view, kinds in views.items():
        for kind in ("non_relational", "relational"):
            assert set(kinds[kind]) == {"accuracy", "low", "high", "n"}
            assert kinds[kind]["n"] == 320
        needs = {kind for kind in kinds if kind.startswith("needs_both")}
        assert len(needs) == (3 if view.startswith("split") else 0)
    assert {"text_to_image", "image_to_text"} <= set(written["retrieval"])


# --- Entry points


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


QUICKSTART = "--config=configs/slam_v3_quickstart.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval.py",), "flag --workdir"),
        (("eval.py", "--workdir=nowhere"), "no such folder"),
        (("train.py", "--workdir=new"), "flag --config"),
        (("train.py", "--workdir=new", "--config=configs/no.py"), "configs/no.py: no such file"),
        (("train.py", "--workdir=new", QUICKSTART, "--config.model.num_heads=7"), "embed_dim"),
        (
            ("train.py", "--workdir=new", QUICKSTART, "--config.run.num_step=7"),
            "run has no field 'num_step'; did you mean 'num_steps'?",
        ),
        (("train.py", "--workdir=new", QUICKSTART, "--steps=7"), "'--steps=7'; expected --config"),
    ],
)
def test_entry_points_say_in_one_line_what_is_wrong(arguments, message):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "new").exists()


def test_a_config_file_that_gives_no_config_is_named(tmp_path):
    path = tmp_path / "config.py"
    with pytest.raises(ConfigError, match="config.py: no such file; give one such as configs/"):
        read_config(path)
    path.write_text("get_config = lambda: {'seed': (1, 2)}")
    assert read_config(path) == {"seed": [1, 2]}
    for text, reason in (
        ("x = 1", "KeyError: 'get_config'"),
        ("def get_config(:", "SyntaxError: "),
        ("def get_config():\n    raise ValueError('one\\ntwo')", "ValueError: one$"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"config.py: get_config: {reason}"):
            read_config(path)


def test_a_preset_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="preset is 'huge'; expected one of tiny, small, "):
        default_config("huge")


def test_an_evaluation_changes_the_data_alone(finished):
    with pytest.raises(ConfigError, match="config.model is part of the checkpoint"):
        evaluate_checkpoint(finished[0], "latest", ["--config.model.embed_dim=64"])


@pytest.mark.parametrize("name", ["quickstart", "sort_of_clevr", "base"])
def test_every_config_builds_its_model(name):
    path = Path(__file__).parents[1] / "configs" / f"slam_v3_{name}.py"
    experiment = Experiment.from_config(runpy.run_path(str(path))["get_config"]())
    config = experiment.with_vocabulary(300)
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 3, 7), jnp.int32)
    image = jax.ShapeDtypeStruct((2, 75, 75, 3), jnp.uint8)
    output = jax.eval_shape(lambda model, t, i: model(t, Inputs(image=i)), model, tokens, image)
    assert output.logits.shape == (2, 3, 7, 300)
