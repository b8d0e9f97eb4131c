"""Training: what is minimised, what a step does, and what a configuration may say."""

import dataclasses
import functools
import json
import operator
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_same
from jax.sharding import Mesh

from slam_jax.data import Batch, Dataset
from slam_jax.errors import ConfigError
from slam_jax.slam_v3 import Inputs, SlamV3
from slam_jax.training import (
    Experiment,
    LossConfig,
    OptimizerConfig,
    default_config,
    make_optimizer,
    make_train_step,
    merge_model,
    override,
    read_config,
    slam_v3_loss,
    split_model,
)
from slam_jax.training.experiment import as_json
from slam_jax.training.losses import LossParts, num_answer_tokens, token_losses
from slam_jax.training.start import compile_step, jit_train_step
from slam_jax.training.state import init_state

ROOT = Path(__file__).parent.parent
VOCAB = 13


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture
def batch(make_inputs):
    """Four examples of two questions: <bos>, a prompt of 1 to 3 tokens, an answer of 1 or 2."""
    rng = np.random.default_rng(0)
    prompt = np.array([[2, 3], [4, 2], [2, 2], [3, 4]], np.int32)
    length = prompt + 1 + np.array([[1, 2], [1, 1], [2, 2], [1, 1]], np.int32)
    tokens = rng.integers(3, VOCAB, (4, 2, 7), np.int32)
    inputs = Inputs(aux=make_inputs(4).aux)
    return Batch(inputs, np.where(np.arange(7) < length[..., None], tokens, 0), prompt, length)


# --- Loss


def test_loss_covers_the_answer_and_its_end_and_nothing_else(batch):
    mask = batch.answer_mask
    assert mask.shape == (4, 2, 6)
    # Prompt of 2, length 4: tokens 2 and 3 are answer and <eos>, predicted at 1 and 2.
    assert mask[0, 0].tolist() == [False, True, True, False, False, False]
    assert mask[0, 1].tolist() == [False, False, True, True, True, False]
    np.testing.assert_array_equal(mask.sum(-1), batch.length - batch.prompt_length)


def test_loss_is_the_mean_over_answer_tokens(build, batch):
    @jax.jit
    def both(model):
        config = LossConfig(z_loss=0.5, alignment=0.1)
        logits = model(batch.tokens[..., :-1], batch.inputs).logits
        return slam_v3_loss(model, batch, config), logits

    parts, logits = both(build())
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
    assert parts.alignment == 0  # the batch does not show text and image of one scene


def test_alignment_counts_where_text_and_image_show_the_same(build, batch, make_inputs):
    whole = make_inputs(4)
    shown = Inputs(text=whole.text, image=whole.image)

    @jax.jit
    def both(model):
        config, paired = (
            LossConfig(alignment=0.1),
            dataclasses.replace(batch, inputs=shown, paired=True),
        )
        text, image = (
            model.embed(Inputs(**x)) for x in ({"text": shown.text}, {"image": shown.image})
        )
        return slam_v3_loss(model, paired, config), model.alignment.loss(text, image)

    parts, alignment = both(build())
    close(parts.alignment, alignment)
    close(parts.total, parts.cross_entropy + 0.1 * parts.alignment)


# --- The step, which is the same for every model: here for one that compiles in no time


class Toy(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(VOCAB, 8, rngs=rngs)
        self.head = nnx.Linear(8, VOCAB, rngs=rngs)


def toy_loss(model, batch, *, key, dropout=0.0):
    """The mean cross-entropy over answer tokens, each predicted from the token before it."""
    x = model.embedding(batch.tokens[..., :-1])
    x *= jax.random.bernoulli(key, 1 - dropout, x.shape)
    losses = token_losses(model.head(x), batch.tokens[..., 1:]).cross_entropy
    mask, zero = batch.answer_mask, jnp.zeros(())
    mean = jnp.sum(losses * mask) / mask.sum()
    return LossParts(mean, mean, zero, zero, zero)


@pytest.fixture(scope="module")
def toy():
    return split_model(Toy())


def test_accumulated_gradients_are_those_of_the_whole_batch(toy, batch):
    graphdef, params = toy
    counts = batch.answer_mask.sum((1, 2))
    assert counts[:2].sum() != counts[2:].sum()  # so a mean of means is another
    sgd = optax.sgd(1.0)
    new = []
    for parts in (1, 2):
        step = make_train_step(
            graphdef, toy_loss, sgd, accumulate_steps=parts, weight_of=num_answer_tokens
        )
        first = init_state(params, sgd, jax.random.key(0), ema=False)
        state, metrics = jax.jit(step)(first, batch)
        new.append((state.params, metrics))
    jax.tree.map(close, *new)


def test_the_update_is_compiled_once_for_all_forms_of_batch(toy, batch, caplog):
    graphdef, params = toy
    config, key = OptimizerConfig(), jax.random.key(0)
    state = init_state(params, make_optimizer(config, 9), key, ema=False)
    # As `initial_state` and a checkpoint place it.
    state = jax.device_put(jax.tree.map(jnp.copy, state), jax.devices()[0])
    step = jit_train_step(graphdef, state, toy_loss, config, 9, num_answer_tokens)
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        for rows in (4, 3, 2):
            some = jax.tree.map(operator.itemgetter(slice(rows)), batch)
            compile_step(step, state, some)
            state, _ = step(state, some)
    compiled = re.findall(r"XLA compilation of jit\((gradients|update)\)", caplog.text)
    assert compiled == ["gradients", "update", "gradients", "gradients"]


def test_donated_steps_lower_the_loss_and_the_average_follows(toy, batch):
    graphdef, params = toy
    config = OptimizerConfig(learning_rate=5e-2, warmup_steps=5, ema_decay=0.5)
    optimizer = make_optimizer(config, 30)
    step = make_train_step(graphdef, toy_loss, optimizer, ema_decay=config.ema_decay)
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
    pairs = zip(jax.tree.leaves(state.best_params), jax.tree.leaves(state.ema), strict=True)
    assert all(best is average for best, average in pairs)
    assert before.params["head"]["kernel"].is_deleted()


@pytest.mark.parametrize("parts", [1, 2])
def test_parameters_of_16_bits_have_moments_and_an_average_of_32(toy, batch, parts):
    """With 8 bits for a number, an average that takes over a thousandth each step stands still."""
    graphdef, params = toy
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=5e-2, warmup_steps=0), 30)
    step = jax.jit(
        make_train_step(graphdef, toy_loss, optimizer, ema_decay=0.999, accumulate_steps=parts)
    )
    state = init_state(params, optimizer, jax.random.key(0), ema=True)
    state = dataclasses.replace(state, step=jnp.int32(10_000))  # where the average is slow
    average = np.asarray(params["head"]["kernel"], np.float32)
    for _ in range(5):
        state, _ = step(state, batch)
        kernel = np.asarray(state.params["head"]["kernel"], np.float32)
        average = 0.999 * average + 0.001 * kernel
    close(state.ema["head"]["kernel"], average)
    assert np.abs(average - np.asarray(params["head"]["kernel"], np.float32)).max() > 1e-4
    floats = [x for x in jax.tree.leaves((state.opt_state, state.ema)) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {np.dtype("float32")}
    for tree in (state.params, state.best_params):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}


def test_each_step_drops_out_by_a_key_of_its_own(toy, batch):
    graphdef, params = toy
    sgd, losses = optax.sgd(0.0), set()
    step = jax.jit(make_train_step(graphdef, functools.partial(toy_loss, dropout=0.5), sgd))
    state = init_state(params, sgd, jax.random.key(0), ema=False)
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.add(float(metrics.loss.total))
    assert len(losses) == 3


def nan_loss(total, model):
    return total * jnp.nan


def nan_gradient(total, model):
    """sqrt(x - x): the value is 0 and the slope is not finite."""
    x = model.embedding.embedding[0, 0]
    return total + jnp.sqrt(x - x)


@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
def test_a_step_that_is_not_finite_is_one_that_never_was(toy, batch, poison):
    graphdef, params = toy
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=2), 10)
    bad = dataclasses.replace(batch, length=-batch.length)  # how the loss below tells them apart

    def poisoned(model, batch, *, key):
        length = jnp.abs(batch.length)
        parts = toy_loss(model, dataclasses.replace(batch, length=length), key=key, dropout=0.1)
        is_bad = batch.length[0, 0] < 0
        return parts._replace(
            total=jax.lax.cond(is_bad, poison, lambda total, _: total, parts.total, model)
        )

    step = jax.jit(make_train_step(graphdef, poisoned, optimizer, ema_decay=0.9))
    state = reference = init_state(params, optimizer, jax.random.key(0), ema=True)
    counts = []
    for each in (batch, bad, bad, batch):
        state, metrics = step(state, each)
        counts.append((int(metrics.bad_steps), int(state.skipped), int(metrics.updates)))
        if each is bad:
            reference = dataclasses.replace(reference, step=reference.step + 1)
        else:
            reference, _ = step(reference, each)
    assert counts == [(0, 0, 0), (1, 1, 1), (2, 2, 1), (0, 2, 1)]
    assert_same(dataclasses.replace(state, skipped=reference.skipped), reference)
    assert not jnp.array_equal(state.params["head"]["kernel"], params["head"]["kernel"])


def test_split_and_merge_are_inverse(build):
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
        (
            "run.best_metric",
            "acuracy",
            "best_metric is 'acuracy'; expected accuracy, loss, loss/",
        ),
        ("run.best_metric", "loss/aux", "with VIEW among image"),
        ("run.best_metric", "image", "run.best_metric is 'image'; expected accuracy"),
        ("run.tensorboard", 1, "run.tensorboard is 1; expected True or False"),
    ],
)
def test_a_value_that_cannot_be_built_is_named(name, value, message):
    config = override(as_json(default_config()), [f"--config.{name}={value!r}"])
    with pytest.raises(ConfigError, match=re.escape(message)):
        Experiment.from_config(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate is inf; expected a number"),
        (f"loss.z_loss={10**400}", "loss.z_loss is 1000"),
        ("model.num_decoder_layers=1000000", "is 1000000; expected at most 512"),
        ("model.image.stage_widths=[8,'x']", "model.image.stage_widths is .* expected a list"),
        ("optimizer.accumulate_steps=3", "accumulate_steps is 3; expected a divisor of data.batch"),
        ("model.dtype=float64", "model.dtype is 'float64'; expected another, or JAX_ENABLE_X64=1"),
        ("model.remat=most", "model.remat is 'most'; expected one of .None, 'maps', 'layers'"),
        ("data.vocab_size=5", "data.vocab_size is 5; expected at least 259"),
        (
            "run.evaluate_views=['split_image_aux_only_aux']",
            "evaluate_views: training has no view 'split_image_aux_only_aux'; did you mean 'split_",
        ),
        ("seed=4294967296", "seed is 4294967296; expected at most 4,294,967,295"),
    ],
)
def test_a_value_that_would_fail_later_is_named_at_once(argument, message):
    with pytest.raises(ConfigError, match=message):
        Experiment.from_config(override(as_json(default_config()), [f"--config.{argument}"]))


def test_fields_must_fit_the_devices_and_the_views_of_the_data_set():
    experiment = Experiment.from_config(
        override(as_json(default_config()), ["--config.run.evaluate_views=['text','aux']"])
    )

    nothing: Any = None
    for sizes, views, message in (
        ((2, 3, 4), (), "batch_size is 64; expected a multiple of 6, optimizer.accumulate_steps"),
        ((2, 4, 3), (), "mesh.process is 3; expected a divisor of model.num_processes=4"),
        ((2, 4, 4), ("aux",), "run.evaluate_views: the data set has no view 'text'"),
    ):
        mesh = Mesh(np.full(sizes, jax.devices()[0]), ("data", "fsdp", "process"))
        validation: Any = SimpleNamespace(views=views)
        dataset = Dataset(nothing, validation, nothing, nothing) if views else None
        with pytest.raises(ConfigError, match=message):
            experiment.check(mesh, dataset)


@pytest.mark.parametrize("config", [{"model": None}, {"seed": 0}])
def test_a_config_of_another_shape_is_refused(config):
    with pytest.raises(ConfigError, match=r"expected a group of fields|expected a value"):
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


@pytest.mark.parametrize("text", ["2024", "1e3", "007", "1_0", "True", "[1]", "data/2024"])
def test_text_that_looks_like_a_number_is_text_where_text_is_expected(text):
    config = as_json(default_config())
    for field in ("path", "data_dir"):
        changed = override(config, [f"--config.data.{field}={text}"])
        assert getattr(Experiment.from_config(changed).data, field) == text
    for written, value in ((repr(text), text), ("None", None)):
        assert override(config, [f"--config.data.path={written}"])["data"]["path"] == value


def test_a_config_file_that_gives_no_config_is_named(tmp_path):
    path = tmp_path / "config.py"
    with pytest.raises(ConfigError, match="config.py: no such file or recipe; give the path"):
        read_config(path)
    path.write_text("get_config = lambda: {'seed': (1, 2)}")
    assert read_config(path) == {"seed": [1, 2]}
    for text, reason in (
        ("x = 1", "KeyError: 'get_config'"),
        ("get_config = lambda: 3", "TypeError: it returns a int, expected groups of fields"),
        ("def get_config(:", "SyntaxError: "),
        ("def get_config():\n    raise ValueError('one\\ntwo')", "ValueError: one$"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"config.py: get_config: {reason}"):
            read_config(path)


def test_a_preset_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="preset is 'huge'; expected one of tiny, small, "):
        default_config("huge")


CONFIGS = sorted((ROOT / "configs").glob("slam_v3_*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_an_experiment(path):
    assert Experiment.from_config(read_config(path)).run.num_steps > 0


@pytest.mark.parametrize("name", ["quickstart", pytest.param("base", marks=pytest.mark.slow)])
def test_a_config_builds_its_model(name):
    experiment = Experiment.from_config(read_config(ROOT / "configs" / f"slam_v3_{name}.py"))
    config = experiment.with_vocabulary(300)
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 3, 7), jnp.int32)
    image = jax.ShapeDtypeStruct((2, 75, 75, 3), jnp.uint8)
    output = jax.eval_shape(lambda model, t, i: model(t, Inputs(image=i)), model, tokens, image)
    assert output.logits.shape == (2, 3, 7, 300)
