"""Low-rank adapters: their start, their sums, merging, training, and the form of peft."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import write_language_model
from flax import nnx
from helpers import assert_same, compiled
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

import slam_jax
from slam_jax import interop
from slam_jax.errors import ConfigError
from slam_jax.language_models import SYSTEMS, make_config, make_model
from slam_jax.layers.linear import Linear
from slam_jax.layers.lora import LoraConfig, add_lora, is_adapter, merge_lora
from slam_jax.slam_v3 import ImageConfig, Inputs, SlamV3, SlamV3Config
from slam_jax.training import (
    Checkpoints,
    OptimizerConfig,
    load,
    loop,
    make_optimizer,
    merge_model,
    override,
    read_config,
    resume,
    split_model,
    train,
)
from slam_jax.training.checkpoint.trees import by_name, from_names
from slam_jax.training.experiment import Experiment
from slam_jax.training.init_from import begin_from
from slam_jax.training.optimizer import decay_mask
from slam_jax.training.sharding import shardings_of
from slam_jax.training.trainable import names_in, split_of

ROOT = Path(__file__).parent.parent
LLAMA, PEFT = ROOT / "tests" / "goldens" / "llama", ROOT / "tests" / "fixtures" / "lora"
TOKENS = np.arange(2 * 3 * 5).reshape(2, 3, 5) % 13
ALL = LoraConfig(rank=2, alpha=3.0, patterns=("*",))


def trained(model: Any, scale: float = 0.3) -> Any:
    """A copy whose adapters do something: B is random."""
    graphdef, params = split_model(model)
    rng = np.random.default_rng(0)
    new = {
        name: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype) if name.endswith("lora_b") else x
        for name, x in by_name(params).items()
    }
    return merge_model(graphdef, from_names(new, params))


def adapters(model: Any) -> dict[str, Any]:
    return {name: x for name, x in by_name(split_model(model)[1]).items() if is_adapter(name)}


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Measured by the largest number of each array."""

    def check(x: Any, y: Any) -> None:
        most = max(1.0, float(np.abs(y).max(initial=0)))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * most)

    jax.tree.map(check, actual, expected)


@jax.jit
def used(model: SlamV3, inputs: Inputs) -> Any:
    """Everything that a model computes; decoding steps in the absorbed form."""
    memory, cache = model.encode(inputs), model.init_cache(TOKENS.shape[:-1], TOKENS.shape[-1])
    output = model(TOKENS, inputs, attention=True)
    logits, cache = model.prefill(TOKENS[..., :3], cache, memory)
    steps = [logits]
    for i in range(3, TOKENS.shape[-1]):
        logits, cache = model.decode_step(TOKENS[..., i], cache, memory)
        steps.append(logits[..., None, :])
    return output.logits, jnp.concatenate(steps, -2), output.attention, model.embed(inputs)


# --- The start


@pytest.mark.release
def test_a_new_adapter_changes_no_output_and_no_other_parameter(build, make_inputs):
    plain, new, inputs = build(), build(lora=ALL), make_inputs()
    others = {x: y for x, y in by_name(split_model(new)[1]).items() if not is_adapter(x)}
    assert_same(others, by_name(split_model(plain)[1]))
    assert_same(used(new, inputs), used(plain, inputs))
    for name, x in adapters(new).items():
        assert not x.any() if name.endswith("lora_b") else x.std() > 0, name
    a = new.decoder.layers[0].attention.out.lora_a
    assert a.shape == (2, 16, 2)
    bound = (2 * 16) ** -0.5
    assert 0.8 * bound < np.abs(a[...]).max() <= bound


def test_shapes_are_those_of_the_map_and_its_stack(build):
    stack = build(lora=ALL).processes.stack.layers[0]
    assert stack.query.kernel.shape == (4, 32, 2, 16)
    assert (stack.query.lora_a.shape, stack.query.lora_b.shape) == ((4, 32, 2), (4, 2, 2, 16))
    linear: Any = Linear((2, 3), 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    add_lora(linear, 4, 2.0, ("*",), nnx.Rngs(1))
    assert linear.lora_scale == 0.5 and linear.lora_a.dtype == jnp.float32
    linear.lora_b[...] = jnp.ones((4, 5))
    w = linear.kernel[...] + 0.5 * jnp.sum(linear.lora_a[...], -1)[..., None]
    np.testing.assert_allclose(linear.weight, w, atol=1e-6)
    assert merge_lora(linear).kernel.dtype == jnp.bfloat16


# --- Sums


@pytest.mark.release
def test_merged_weights_compute_the_same_also_absorbed(build, make_inputs):
    model, inputs = trained(build(lora=ALL)), make_inputs()
    merged = merge_lora(model)
    assert not adapters(merged) and merged.config == build().config
    assert adapters(model) and model.config.lora == ALL
    found, expected = used(model, inputs), used(merged, inputs)
    assert_close(found, expected)
    assert_close(found[1], found[0])  # absorbed and expanded
    assert np.abs(found[0] - used(build(), inputs)[0]).max() > 0.1
    assert merge_lora(merged) is merged


@pytest.mark.release
def test_every_adapter_has_a_gradient(build, make_inputs):
    inputs = make_inputs()
    graphdef, params = split_model(build(lora=ALL))
    start = jax.tree.leaves(split_model(trained(build(lora=ALL)))[1])

    @jax.jit
    def gradients(params: Any) -> Any:
        def loss(params: Any) -> Any:
            model = merge_model(graphdef, params)
            return (model(TOKENS, inputs).logits ** 2).mean() + model.embed(inputs)[..., 0].sum()

        return jax.grad(loss)(params)

    at_start = by_name(gradients(params))
    for name, x in at_start.items():
        if is_adapter(name):  # what reads B alone is the same at first
            assert x.any() == name.endswith("lora_b"), name
    later = by_name(gradients(jax.tree.unflatten(jax.tree.structure(params), start)))
    assert all(x.any() for name, x in later.items() if is_adapter(name))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["maps", "layers"])
def test_stacked_layers_compute_the_same_when_rematerialised(make_inputs, remat):
    vit = ImageConfig("vit", size=6, patch_size=3, num_layers=2)
    depths: Any = dict(num_process_layers=2, num_decoder_layers=2, image=vit, lora=ALL)

    def make(**changes: Any) -> SlamV3:
        return SlamV3(SlamV3Config.preset("tiny", 13, **depths, **changes), rngs=nnx.Rngs(0))

    single, stacked = make(scan_layers=False), make(scan_layers=True, remat=remat)
    assert any(len(x.shape) == 5 for x in jax.tree.leaves(split_model(stacked)[1]))
    # Each layer of a stack starts as it does alone.
    assert_same(adapters(stacked), adapters(single))
    single = trained(single)
    graphdef, like = split_model(stacked)
    stacked = merge_model(graphdef, from_names(by_name(split_model(single)[1]), like))
    inputs = make_inputs(size=6)

    def run(graphdef: Any, params: Any) -> Any:
        def loss(params: Any) -> Any:
            return (merge_model(graphdef, params)(TOKENS, inputs).logits ** 2).mean()

        return jax.value_and_grad(loss)(params)

    found, expected, merged = (
        jax.jit(functools.partial(run, graphdef))(params)
        for graphdef, params in map(split_model, (stacked, single, merge_lora(stacked)))
    )
    assert_close((found[0], by_name(found[1])), (expected[0], by_name(expected[1])))
    assert_close(merged[0], expected[0])


SLOW = {name: pytest.mark.slow for name in SYSTEMS if name != "slam_v5"}


@pytest.mark.release
@pytest.mark.parametrize("name", [pytest.param(x, marks=SLOW.get(x, ())) for x in SYSTEMS])
def test_a_language_model_alone_computes_the_same(name):
    config = make_config(name, "tiny", vocab_size=13)
    model = make_model(config, rngs=nnx.Rngs(0))
    before = model(TOKENS[0]).logits
    add_lora(model, 2, 3.0, ("*",), nnx.Rngs(1))
    assert_same(model(TOKENS[0]).logits, before)
    model = trained(model)

    @jax.jit
    def run(model: Any) -> Any:
        tokens, cache = TOKENS[0], model.init_cache((3,), 5)
        logits, cache = model.prefill(tokens[:, :4], cache)
        last, _ = model.decode_step(tokens[:, 4], cache)
        return model(tokens).logits, jnp.concatenate([logits, last[:, None]], 1)

    (full, steps), merged = run(model), run(merge_lora(model))
    assert_close((full, full), merged)
    assert_close(steps, full)
    assert np.abs(full - before).max() > 0.01


# --- Patterns


def test_patterns_choose_linear_maps(build):
    config = SlamV3Config.preset("tiny", 13, num_decoder_layers=2)

    def chosen(*patterns: str) -> set[str]:
        own = dataclasses.replace(config, lora=LoraConfig(1, 1.0, patterns))
        model = nnx.eval_shape(lambda: SlamV3(own, rngs=nnx.Rngs(0)))
        return {name.rpartition("/")[0] for name in adapters(model)}

    layers = {f"decoder/layers/{i}/mlp/{x}" for i in (0, 1) for x in ("gate", "up", "down")}
    assert chosen("decoder/layers/*/mlp") == layers
    assert chosen("decoder/layers/0/mlp/up", "head") == {"decoder/layers/0/mlp/up", "head"}
    assert not chosen("*") & {"embedding"} and chosen("*") > layers


def test_a_pattern_of_experts_or_of_a_part_of_a_stack_is_refused():
    config = make_config("moe", "tiny", num_layers=3, scan_layers=True)
    model = make_model(config, rngs=nnx.Rngs(0))
    for pattern in ("*/experts", "*/experts/gate/kernel", "embedding"):
        match = rf"lora.patterns has the pattern '{re.escape(pattern)}', which matches no linear"
        with pytest.raises(ConfigError, match=rf"{match} map \(experts and embeddings have no"):
            add_lora(model, 2, 1.0, (pattern,), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="did you mean 'blocks/0/attention/query'"):
        add_lora(model, 2, 1.0, ("blocks/0/attention/quer",), nnx.Rngs(0))
    with pytest.raises(ConfigError, match="match blocks/1/attention/query and not all layers"):
        add_lora(model, 2, 1.0, ("blocks/1/attention/query",), nnx.Rngs(0))
    assert not adapters(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "model.lora.rank is -1; expected at least 0"),
        ({"rank": 2}, r"model.lora.patterns is \(\); expected some, or \(\) while"),
        ({"patterns": ["head"]}, r"model.lora.patterns is \('head',\); expected some, or \(\)"),
        ({"rank": 2, "patterns": ["head"], "alpha": 0.0}, "model.lora.alpha is 0.0; expected a"),
        ({"rank": 2, "patterns": "head"}, "model.lora.patterns is 'head'; expected a list"),
        ({"rnak": 2}, "lora has no field 'rnak'; did you mean 'rank'"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    config = read_config(ROOT / "tests" / "configs" / "small_run.py")
    config["model"]["lora"] = fields
    with pytest.raises(ConfigError, match=message):
        Experiment.from_config(config)


def test_a_stored_configuration_without_the_group_means_none():
    config = read_config(ROOT / "tests" / "configs" / "small_run.py")
    assert config["model"].pop("lora")
    assert Experiment.from_config(config).model.lora == LoraConfig()


# --- Training, without a run


def test_adapters_train_beside_a_frozen_base_and_alone(build):
    shapes = split_model(build(lora=ALL))[1]
    names = names_in(shapes)
    own = {name for name in names if is_adapter(name)}
    base = {x: y for x, y in by_name(shapes).items() if re.match("decoder.*kernel", x)}
    given = split_of(shapes, OptimizerConfig(), base)
    assert given.frozen == base.keys() and own < names - given.frozen
    alone = split_of(shapes, OptimizerConfig(train=("*lora_*",)), base)
    assert names - alone.frozen == own


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adapters_do_not_decay_and_are_no_matter_of_muon(build, name):
    params = split_model(trained(build(lora=ALL)))[1]
    assert not any(x for n, x in by_name(decay_mask(params)).items() if is_adapter(n))
    own = {"up": {"lora_a": jnp.full((4, 2), 3.0), "lora_b": jnp.full((2, 4), 3.0)}}
    gradients = jax.tree.map(lambda x: jnp.ones_like(x).at[0, 0].set(2.0), own)
    for decay in (0.0, 0.5):
        config = OptimizerConfig(name, warmup_steps=0, weight_decay=decay, clip_norm=None)
        optimizer = make_optimizer(config, 10)
        updates, _ = compiled(optimizer.update, gradients, optimizer.init(own), own)
        # The first step of Adam has the same size for every gradient.
        [size] = {round(float(y), 8) for x in jax.tree.leaves(updates) for y in np.ravel(x)}
        np.testing.assert_allclose(size, -1e-3 if name == "adamw" else -1.4737e-3, rtol=1e-3)


def test_adapters_are_sharded_along_the_width(build):
    mesh = jax.make_mesh((1, 1), ("fsdp", "process"))
    placed = by_name(shardings_of(split_model(build(lora=ALL))[1], mesh))
    query = "processes/stack/layers/0/query"
    assert placed[f"{query}/lora_a"].spec == PartitionSpec("process", "fsdp")
    assert placed[f"{query}/lora_b"].spec == PartitionSpec("process", None, None, "fsdp")


# --- peft


def test_merged_weights_are_those_of_peft(tmp_path):
    """`tests/fixtures/lora` says how peft made them."""
    config = json.loads((PEFT / "adapter_config.json").read_text())
    stored = load_file(PEFT / "adapter_model.safetensors")
    maps = {"q_proj": "attention/query", "o_proj": "attention/out", "down_proj": "mlp/down"}
    theirs = {f"{i}.{x}": f"blocks/{i}/{maps[x]}" for i in (0, 2) for x in config["target_modules"]}
    model, _ = interop.load_pretrained(LLAMA)
    tokens = np.load(LLAMA / "tokens.npy")
    add_lora(model, config["r"], config["lora_alpha"], tuple(theirs.values()), nnx.Rngs(0))
    modules = {"/".join(map(str, path)): x for path, x in nnx.iter_modules(model)}
    for key, x in stored.items():
        layer, _, name, factor, _ = key.removeprefix("base_model.model.model.layers.").split(".")
        param = getattr(modules[theirs[f"{layer}.{name}"]], factor.lower())
        param[...] = jnp.asarray(x.T).reshape(param.shape)
    assert len(stored) == len(adapters(model)) == 12
    logits = compiled(lambda tokens: model(tokens).logits, tokens)
    np.testing.assert_allclose(logits, np.load(PEFT / "logits.npy"), atol=2e-4)
    # An export merges by itself, and the publisher's code reads it.
    interop.save_pretrained(model, tmp_path / "model")
    interop.save_pretrained(merge_lora(model), tmp_path / "merged")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    assert_same(ours, load_file(tmp_path / "merged" / "model.safetensors"))
    merged = load_file(PEFT / "merged.safetensors")
    for key, before in load_file(LLAMA / "model.safetensors").items():
        if key in merged:
            np.testing.assert_allclose(ours[key], merged[key], atol=1e-6, rtol=0, err_msg=key)
            assert np.abs(ours[key] - before).max() > 0.1
        else:
            np.testing.assert_array_equal(ours[key], before, err_msg=key)


# --- Runs

PATTERNS = ("decoder/language_model/blocks/*/attention/query", "decoder/*/mlp", "processes")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A folder of the hub with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("lora") / "lm"
    write_language_model(folder)
    return folder


@pytest.fixture(scope="module")
def config(language_model, tmp_path_factory):
    changes = {
        "data.data_dir": str(tmp_path_factory.mktemp("data")),
        "run.num_steps": 4,
        "run.evaluate_every": 2,
        "run.save_every": None,
        "optimizer.ema_decay": 0.9,
        "model.decoder.pretrained": str(language_model),
        "model.lora.rank": 2,
        "model.lora.alpha": 8,
        "model.lora.patterns": PATTERNS,
    }
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    return override(read_config(ROOT / "tests" / "configs" / "small_run.py"), arguments)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The workdir, the first and the last state of a run; later ones share its jitted step."""
    workdir, states, steps = tmp_path_factory.mktemp("run"), [], {}
    initial, jit_step = resume.initial_state, loop.jit_step

    def remember(*arguments):
        graphdef, state = initial(*arguments)
        states.append(jax.tree.map(jnp.copy, state))
        return graphdef, state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "initial_state", remember)
        patch.setattr(loop, "jit_step", lambda *x: steps.setdefault(0, jit_step(*x)))
        state = train(config, workdir)
        yield workdir, states[0], state


@pytest.mark.release
def test_a_run_trains_adapters_of_a_frozen_base(finished, language_model):
    _, first, last = finished
    assert_same(last.frozen, first.frozen)
    base = split_model(interop.load_pretrained(language_model, scan_layers=False)[0])[1]
    assert_same(by_name(last.frozen["decoder"]["language_model"]), by_name(base))
    before, after = by_name(first.params), by_name(last.params)
    own = [name for name in after if is_adapter(name)]
    assert any(x.startswith("decoder/language_model/blocks/1/attention/query/") for x in own)
    assert all((after[name] != before[name]).any() for name in own)


@pytest.mark.release
def test_a_checkpoint_has_the_adapters_and_not_their_base(finished):
    workdir, _, state = finished
    saved = Checkpoints(workdir).read_shapes(4)
    assert "frozen" not in saved or not names_in(saved["frozen"])
    assert names_in(saved["params"]) == names_in(saved["ema"]) == names_in(state.params)
    base = {x for x in names_in(saved["params"]) if x.startswith("decoder/language_model")}
    assert base and all(is_adapter(name) for name in base)


@pytest.mark.release
def test_a_resumed_run_with_adapters_is_the_unbroken_one(config, finished, tmp_path):
    workdir, _, state = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert_same(train(config, tmp_path / "run"), state)


INPUTS = Inputs(aux=np.random.default_rng(0).normal(size=(2, 3, 10)).astype(np.float32))


@jax.jit
def answered(model):
    return model(TOKENS, INPUTS).logits


@pytest.mark.slow
def test_a_loaded_model_keeps_its_adapters_and_a_shared_one_has_them_merged(finished, tmp_path):
    workdir, _, state = finished
    loaded = load(workdir, 4)
    assert_same(by_name(split_model(loaded.model)[1]), by_name(state.best_params))
    # The adapters of four steps are small.
    loaded = loaded._replace(model=trained(loaded.model, 0.1))
    expected = answered(loaded.model)
    slam_jax.save_pretrained(loaded, tmp_path / "shared")
    shared = load(tmp_path / "shared")
    assert shared.model.config.lora == LoraConfig() and not adapters(shared.model)
    assert_close(answered(shared.model), expected)
    plain = from_names(
        {**by_name(split_model(shared.model)[1]), **plain_kernels(loaded.model)},
        split_model(shared.model)[1],
    )
    without = answered(merge_model(split_model(shared.model)[0], plain))
    assert np.abs(without - expected).max() > 1e-2
    # The language model alone.
    inner = loaded.model.decoder.language_model
    interop.save_pretrained(inner, tmp_path / "inner")
    alone = interop.load_pretrained(tmp_path / "inner")[0]
    assert_close(alone(TOKENS).logits, inner(TOKENS).logits)


def plain_kernels(model: Any) -> dict[str, Any]:
    """The adapted kernels before merging."""
    params = by_name(split_model(model)[1])
    adapted = {name.rpartition("/")[0] for name in params if is_adapter(name)}
    return {f"{name}/kernel": params[f"{name}/kernel"] for name in adapted}


@pytest.mark.release
def test_the_command_writes_merged_weights(finished, tmp_path):
    workdir, _, _ = finished
    command = [sys.executable, "-m", "slam_jax.trained", f"--workdir={workdir}", "--step=4"]
    arguments = [*command, f"--output={tmp_path / 'out'}", "--dtype=float32"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["config"]["model"]["lora"] == {"rank": 0, "alpha": 16.0, "patterns": []}
    merged = by_name(split_model(merge_lora(load(workdir, 4).model))[1])
    found = by_name(split_model(load(tmp_path / "out").model)[1])
    assert found.keys() == merged.keys()
    assert_close(found, merged, 1e-6)


@pytest.mark.slow
def test_a_new_run_begins_with_merged_weights_unless_it_has_the_adapters(finished, tmp_path):
    workdir, first, _ = finished
    loaded = load(workdir)
    source, tokenizer = by_name(split_model(loaded.model)[1]), loaded.tokenizer
    begun, said = begin_from(str(workdir), tmp_path, (), first, tokenizer)
    assert "arrays match" in said and "absent" not in said
    own = by_name(begun.params)
    assert_same(own, {name: source[name] for name in own})
    merged = merge_lora(loaded.model)
    params = jax.tree.map(jnp.zeros_like, split_model(merged)[1])
    plain = dataclasses.replace(first, params=params, ema=None, frozen=None)
    begun, _ = begin_from(str(workdir), tmp_path, (), plain, tokenizer)
    assert_same(by_name(begun.params), by_name(split_model(merged)[1]))
